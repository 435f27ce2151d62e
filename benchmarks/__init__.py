"""What slimline achieves, measured; the table of the README comes from here."""
