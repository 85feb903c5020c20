"""What the templates of each kind of page receive."""
