"""The paper as functions and small modules: losses, flow matching, wider ports, closed form, metrics."""
