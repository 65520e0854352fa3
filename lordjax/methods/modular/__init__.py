"""MoDeGPT: layers that share an inner width become narrower together and stay dense."""
