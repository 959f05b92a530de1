"""Every task by name: `TASKS["digits_mlp"](data_dir, examples=300, label_noise=0.2)`."""

from collections.abc import Callable

from benchmarks.claims import graphs, images, text
from benchmarks.claims.task import Parts, Split, Task

__all__ = ["TASKS", "Parts", "Split", "Task"]

TASKS: dict[str, Callable[..., Task]] = {
    "digits_mlp": images.digits_mlp,
    "digits_mlp_bn": images.digits_mlp_bn,
    "fashion_mlp": images.fashion_mlp,
    "fashion_cnn": images.fashion_cnn,
    "cifar_resnet": images.cifar_resnet,
    "cora_gcn": graphs.cora_gcn,
    "mutag_gin": graphs.mutag_gin,
    "proteins_gin": graphs.proteins_gin,
    "nci1_gin": graphs.nci1_gin,
    "sst2_bag": text.sst2_bag,
    "sst2_transformer": text.sst2_transformer,
    "news20_bag": text.news20_bag,
    "shakespeare_gru": text.shakespeare_gru,
    "shakespeare_transformer": text.shakespeare_transformer,
}
