"""What some studies measure beyond the columns of `Atlas.units`: one module for each of these studies."""
