"""Administration: one vocabulary of commands (`commands`), one place that has them carried out (`admin`),
and a Unix socket that brings them to a running gateway (`server`, `client`)."""
