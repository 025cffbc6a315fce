"""Networks taken elsewhere: one file a format, and the check that each passes before it appears under its name."""
