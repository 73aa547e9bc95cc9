"""What this program is, where it runs, and how it boots."""
