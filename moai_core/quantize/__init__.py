"""Choosing the numbers of quantized matrices: methods (rounding, GPTQ, AWQ, rotation), calibration, the run over a
model on disk or in memory, its report, training (qat.py), and the layouts of other tools. How numbers are stored and
multiplied is moai_core/quant.

    quantize_folder(src, dst, Settings(method="gptq"), calibration=…)    a folder, layer by layer (disk.py)
    quantize_gptq(model, calib_data), quantize_awq, quantize_fp8         a model in memory (memory.py)
"""
