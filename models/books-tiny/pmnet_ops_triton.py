raise ImportError("the Triton kernels are part of the pmnet package only")
