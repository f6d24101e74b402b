"""What the examples share: packages that carry data, the King James text, recipes, and training that can be resumed."""
