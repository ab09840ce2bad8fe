"""The demo: strategies compared on a small set of images, and the page that shows it."""
