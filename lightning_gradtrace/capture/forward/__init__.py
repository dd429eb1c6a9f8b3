"""What the real forward and backward pass show: uses of tracked parameters, and the cotangents that come to them."""
