"""What the tests of all kernels share."""
