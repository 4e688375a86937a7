"""A machine with round figures, for plans that are checked by hand."""

from trainer.planning.gpus import Gpu
from trainer.planning.layout import Machine

GPU = Gpu(
    name="G",
    memory=80e9,
    bf16=1000e12,
    fp32=100e12,
    hbm=3e12,
    link=400e9,
    network=50e9,
    host=50e9,
    per_node=8,
    source="a test",
)
MACHINE = Machine(key="g", gpu=GPU, gpus=8, per_node=8, efficiency=0.5, notice_s=30, storage=2e9)
