"""Where files of the product lie, and how parameters are named."""
