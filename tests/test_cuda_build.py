"""The kernels compile for GPUs on machines without one; whether they run there is for `--device cuda`."""

import pytest
import torch
import warp as wp

from envs.smac import start_warp


@pytest.mark.parametrize("arch", [80, 90])  # A100, H100
def test_the_engine_compiles_for_cuda(arch, tmp_path):
    start_warp(torch.device("cpu"))  # quiets Warp
    if arch not in wp.get_cuda_supported_archs():
        pytest.skip(f"this build of Warp has no CUDA compiler for sm_{arch}")
    wp.compile_aot_module("envs.smac", arch=arch, module_dir=tmp_path)
    binaries = list(tmp_path.glob(f"*sm{arch}*.cubin"))
    assert len(binaries) == 1
    code = binaries[0].read_bytes()
    assert b"play" in code and b"restart" in code
