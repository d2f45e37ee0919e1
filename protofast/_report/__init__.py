"""What commands find, as sections in folders; and an HTML page that gathers them."""
