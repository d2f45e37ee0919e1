"""The Triton backend. Triton itself is imported at a kernel's first call."""
