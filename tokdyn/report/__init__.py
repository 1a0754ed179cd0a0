"""Draw figures: grids of images, boundary maps (which tokens were kept), and curves of cost and quality."""
