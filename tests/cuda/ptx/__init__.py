"""An interpreter for the PTX that compilers emit."""
