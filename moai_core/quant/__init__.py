"""Quantized matrices: how their numbers are stored (formats.py), the layers that hold them (linear.py) and who
multiplies with them (kernels.py, one file a kernel). How the numbers are chosen is moai_core/quantize."""
