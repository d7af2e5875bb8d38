//! Tables for a terminal: two spaces between columns, no frame, nothing wrapped, so that lines can be cut and searched.
//!
//! Cleans every cell: what comes from a worker must not steer a terminal.

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, TableStyle};
use protocol::limits::clean_text;

/// How tables may look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Style {
    /// Colours are welcome.
    pub colour: bool,
}

/// What a cell says about its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Under way, or to be watched.
    Busy,
    /// Someone should look.
    Bad,
    /// Beside the point.
    Soft,
}

/// A table being filled.
#[derive(Debug)]
pub struct Table {
    style: Style,
    columns: Vec<String>,
    inner: comfy_table::Table,
}

impl Table {
    /// An empty table. A column whose title starts with `>` is aligned to the right.
    pub fn new(style: Style, columns: &[impl AsRef<str>]) -> Self {
        let mut inner = comfy_table::Table::new();
        inner.load_style(TableStyle::new()).set_content_arrangement(ContentArrangement::Disabled);
        if style.colour {
            inner.enforce_styling();
        } else {
            inner.force_no_tty();
        }
        let columns: Vec<String> = columns.iter().map(|title| clean_text(title.as_ref())).collect();
        inner.set_header(columns.iter().map(|title| Cell::new(title.trim_start_matches('>'))));
        Self { style, columns, inner }
    }

    /// Adds a row: texts, some with a tone.
    pub fn row(&mut self, cells: impl IntoIterator<Item = (String, Option<Tone>)>) -> &mut Self {
        let cells = cells.into_iter().map(|(text, tone)| {
            let cell = Cell::new(clean_text(&text).replace('\n', " "));
            match tone {
                Some(tone) if self.style.colour => cell.fg(colour(tone)),
                _ => cell,
            }
        });
        self.inner.add_row(cells.collect::<Vec<_>>());
        self
    }

    /// Adds a row of texts.
    pub fn plain<const N: usize>(&mut self, cells: [String; N]) -> &mut Self {
        self.row(cells.map(|text| (text, None)))
    }

    /// The table as text, lines ended; empty for a table without rows.
    pub fn render(mut self) -> String {
        if self.inner.is_empty() {
            return String::new();
        }
        for (index, title) in self.columns.iter().enumerate() {
            if let Some(column) = self.inner.column_mut(index) {
                column.set_padding((0, 2));
                if title.starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        self.inner.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

fn colour(tone: Tone) -> Color {
    match tone {
        Tone::Good => Color::Green,
        Tone::Busy => Color::Yellow,
        Tone::Bad => Color::Red,
        Tone::Soft => Color::DarkGrey,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_cells_cannot_steer_a_terminal() {
        let mut table = Table::new(Style::default(), &["id", ">bytes", "host"]);
        table.plain(["r1".to_owned(), "7".to_owned(), "box\u{1b}[2J\nx".to_owned()]);
        table.plain(["r10".to_owned(), "1234".to_owned(), "b".to_owned()]);
        assert_eq!(table.render(), "id   bytes  host\nr1       7  box [2J x\nr10   1234  b\n");
        assert_eq!(Table::new(Style::default(), &["id"]).render(), "");
    }

    #[test]
    fn colour_only_where_it_is_welcome() {
        let render = |colour| {
            let mut table = Table::new(Style { colour }, &["state"]);
            table.row([("failed".to_owned(), Some(Tone::Bad))]);
            table.render()
        };
        assert!(render(true).contains("\u{1b}["));
        assert_eq!(render(false), "state\nfailed\n");
    }
}
