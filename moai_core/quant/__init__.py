"""Quantized matrices: how their numbers are stored (formats.py), the layers that hold them (linear.py) and who
multiplies with them (kernels.py, one file a kernel). How the numbers are chosen is moai_core/quantize."""

from moai_core.quant import bnb, formats, fp4, fp8

# Here and not in formats.py, which these modules build on.
_MORE: tuple[formats.Format, ...] = (fp8.Fp8(), fp4.NvFp4(), fp4.MxFp4(), bnb.Nf4(), bnb.Nf4Double(), bnb.Bnb8())
formats.FORMATS.update({format.name: format for format in _MORE})
