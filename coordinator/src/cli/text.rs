//! Figures as people read them: bytes, durations, moments. Does not print.

use std::time::Duration;

use protocol::time::{Human, UnixMillis};

/// `512 B`, `1.5 MB`, `2.0 GB`, in powers of 1000 as everywhere in bonepile.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `4.2 s`, `3m 20s`.
pub fn duration_ms(duration_ms: u64) -> String {
    Human(Duration::from_millis(duration_ms)).to_string()
}

/// `2026-11-21 08:53:48 UTC`.
pub fn moment(moment: UnixMillis) -> String {
    let seconds = moment.0 / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", second / 3600, second / 60 % 60, second % 60)
}

/// The date of a day counted from 1970-01-01 (Hinnant's `civil_from_days`, for days that are not negative).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// How long ago, or from now: `12 s ago`, `in 59m 58s`.
pub fn relative(moment: UnixMillis, now: UnixMillis) -> String {
    if moment > now {
        format!("in {}", duration_ms(moment.since_ms(now)))
    } else {
        format!("{} ago", duration_ms(now.since_ms(moment)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_as_people_write_them() {
        assert_eq!([bytes(0), bytes(999), bytes(1536), bytes(3_000_000_000)], ["0 B", "999 B", "1.5 kB", "3.0 GB"]);
        assert_eq!(moment(UnixMillis(0)), "1970-01-01 00:00:00 UTC");
        assert_eq!(moment(UnixMillis(951_827_696_000)), "2000-02-29 12:34:56 UTC");
        assert_eq!(moment(UnixMillis(1_798_761_599_999)), "2026-12-31 23:59:59 UTC");
        assert_eq!(relative(UnixMillis(5_000), UnixMillis(9_000)), "4.0 s ago");
        assert_eq!(relative(UnixMillis(70_000), UnixMillis(9_000)), "in 1m 01s");
    }
}
