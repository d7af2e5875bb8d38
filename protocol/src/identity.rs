//! Roles, join tokens, names in certificates.
