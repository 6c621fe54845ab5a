"""The language: what runs at which site, and what can run it."""
