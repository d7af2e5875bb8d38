//! `cluster.toml`: the coordinator's settings, parsed from text. Does not read files or the environment.
