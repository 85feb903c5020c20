"""Check many architectures with random weights on a worker's code path against plain PyTorch, for docs/networks.md.

Every network is checked in a separate process: layers are found, visualizations of two units in five layers are
rendered for a few steps by a worker's code in the precision of `auto`, and objective and input gradient at the start
are compared with a plain forward pass with one hook. `--cases DIR` adds small networks from a folder of builders.
"""

import argparse
import dataclasses
import fnmatch
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "networks.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
LIMIT = 600.0  # seconds for one network
SMALL = (64, 96)  # input sides in pixels that are tried before the network's own

# One network of each of torchvision's families, with the smallest input that it accepts unless it is given.
TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vgg16",
    "vit_b_16",
    "wide_resnet50_2",
]

DENSE = [
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
]

TIMM = [
    "tf_efficientnet_lite0",
    "mobilenetv4_conv_small",
    "mobilevit_xxs",
    "mobileone_s0",
    "fastvit_t8",
    "repvgg_a0",
    "ghostnet_100",
    "efficientformer_l1",
    "efficientvit_b0",
    "edgenext_xx_small",
    "levit_128s",
    "poolformer_s12",
    "pit_ti_224",
    "twins_svt_small",
    "visformer_tiny",
    "xcit_nano_12_p16_224",
    "davit_tiny",
    "tiny_vit_5m_224",
    "eca_nfnet_l0",
    "hrnet_w18_small",
    "dla34",
    "res2net50_26w_4s",
    "resnest14d",
    "skresnet18",
    "selecsls42",
    "ese_vovnet19b_dw",
    "rexnet_100",
    "lcnet_050",
    "mixnet_s",
    "inception_next_tiny",
    "hgnet_tiny",
    "starnet_s1",
    "repvit_m0_9",
    "deit_tiny_distilled_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "halonet26t",
    "coatnet_nano_rw_224",
    "convnextv2_atto",
    "hiera_tiny_224",
    "mambaout_femto",
    "mixer_s32_224",
    "resmlp_12_224",
    "eva02_tiny_patch14_224",
]

# Networks of timm without a classifier.
HEADLESS = {
    "resnet18 features_only": ["model.name=resnet18", "model.arguments={features_only: true}"],
    "mobilenetv3_small_050 features_only": [
        "model.name=mobilenetv3_small_050",
        "model.arguments={features_only: true}",
    ],
    "convnext_atto num_classes=0": ["model.name=convnext_atto", "model.arguments={num_classes: 0}"],
    "vit_base_patch32_clip_224 num_classes=0": [
        "model.name=vit_base_patch32_clip_224",
        "model.arguments={num_classes: 0}",
    ],
}

# Builders of the cases that must work; the others must be refused, and tests check the messages.
CASES = [
    "pointwise:add",
    "pointwise:addbn",
    "pointwise:relu",
    "pointwise:relubn",
    "pointwise:depthwise",
    "inplace:build",
    "dense:unet",
    "dense:autoenc",
    "keyword_and_outputs:dict_",
    "keyword_and_outputs:list_",
    "keyword_and_outputs:dataclass",
    "keyword_and_outputs:dict2",
    "keyword_and_outputs:list2",
    "keyword_and_outputs:dataclass2",
    "keyword_norm:build",
    "weight_norm:build",
    "constants_and_gradients:ownhooks",
    "constants_and_gradients:const",
    "constants_and_gradients:cached",
    "constants_and_gradients:double",
    "constants_and_gradients:gray",
    "constants_and_gradients:nograd",
    "constants_and_gradients:detach",
    "constants_and_gradients:inference",
    "constants_and_gradients:rounded",
    "fft:build",
    "conv3d:build_wrapped",
    "not_finite:root",
    "half:cast",
    "half:build",
    "half:auto",
    "modes:train_forced",
    "shared_modules:build",
    "transformer_fastpath:build",
    "silent_units:build",
]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network: its label, the group it is listed in, and the overrides that select it."""

    label: str
    group: str
    overrides: Sequence[str]


def entries(cases: Path | None) -> Iterator[Entry]:
    """Return every network of the table."""
    for name in TORCHVISION:
        yield Entry(name, "torchvision", ["model=torchvision", f"model.name={name}", "model.weights=null"])
    for name in DENSE:
        overrides = ["model=torchvision", f"model.name={name}", "model.weights=null", "model.input_size=96"]
        yield Entry(name, "torchvision, dense", overrides)
    for name in TIMM:
        yield Entry(name, "timm", ["model=timm", f"model.name={name}", "model.weights=null"])
    for label, overrides in HEADLESS.items():
        yield Entry(label, "timm, headless", ["model=timm", "model.weights=null", *overrides])
    for case in CASES if cases else ():
        file, _, builder = case.partition(":")
        target = f"model.target={cases}/{file}.py:{builder}"
        yield Entry(case, "case", ["model=custom", target, "model.input_size=48"])


def one(overrides: Sequence[str], answer: Connection) -> None:
    """Check one network in this process, and send the result or the error."""
    import torch
    from check import check, configuration

    from pipeline.core.errors import AtlasError

    torch.set_num_threads(1)
    began = time.monotonic()
    fixed = any(override.startswith("model.input_size=") for override in overrides)
    try:
        sizes = [] if fixed else [[f"model.input_size={side}"] for side in SMALL]
        for size in (*sizes, []):
            try:
                with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = check(configuration([f"run.root={folder}", *overrides, *size]))
            except AtlasError:
                if not size:
                    raise
                continue  # the network accepts its own size only
            answer.send(dataclasses.asdict(result) | {"wrong": result.wrong})
            return
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")
        answer.send({"error": f"{type(error).__name__}: {text}", "seconds": time.monotonic() - began})


def run(entry: Entry) -> dict[str, Any]:
    """Check one network in a separate process."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=one, args=(list(entry.overrides), there))
    process.start()
    there.close()
    try:
        if here.poll(LIMIT):
            return here.recv()
        return {"error": f"not done after {LIMIT:.0f} s", "seconds": LIMIT}
    except EOFError:
        process.join()
        return {"error": f"the process ended with {process.exitcode}", "seconds": 0.0}
    finally:
        process.kill()
        process.join()


HEADER = (
    "| network | source | px | layers | level | visualizations | objective | input gradient | at best start | "
    "own rounding | cosine | s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(entry: Entry, found: dict[str, Any]) -> str:
    """Return one row of the table."""
    if "error" in found:
        return f"| {entry.label} | {entry.group} | | **{found['error']}** | | | | | | | | {found['seconds']:.0f} |"
    counted = {level: found["levels"].count(level) for level in dict.fromkeys(found["levels"])}
    level = ", ".join(f"{name} {count}" if len(counted) > 1 else name for name, count in counted.items())
    least = f"{found['least']:.1e} ({found['repeated']} of {found['rendered']} units)" if found["repeated"] else ""
    rounding = f"{found['rounding']:.1e}" if found["rounding"] else ""
    made = f"{found['rendered']}" + (f" ({found['failed']} did not rise)" if found["failed"] else "")
    wrong = f" **{found['wrong']}**" if found["wrong"] else ""
    return (
        f"| {entry.label} | {entry.group} | {found['size']} | {found['layers']} | {level or 'no gradient'} | {made} | "
        f"{found['value']:.1e} | {found['gradient']:.1e}{wrong} | {least} | {rounding} | {found['cosine']:.4f} | "
        f"{found['seconds']:.0f} |"
    )


def summary(results: Sequence[tuple[Entry, dict[str, Any]]]) -> str:
    """Return the counts over all networks."""
    errors = [entry.label for entry, found in results if "error" in found]
    right = [found for _, found in results if "error" not in found]
    wrong = sum(bool(found["wrong"]) for found in right)
    convs = [found for found in right if found["convolutional"] and found["levels"]]
    lowered = sum(any(level.startswith("lowered") for level in found["levels"]) for found in convs)
    whole = sum(all(level.startswith("lowered") for level in found["levels"]) for found in convs)
    precisions = sorted({found["precision"] for found in right})
    return (
        f"{len(results)} networks, {len(errors)} errors{': ' + ', '.join(errors) if errors else ''}, {wrong} with "
        f"wrong values. Of {len(convs)} convolutional networks {lowered} run lowered "
        f"({100 * lowered / max(1, len(convs)):.0f} %), {whole} of them in every layer tried. "
        f"Steps in {' and '.join(precisions)}."
    )


def main() -> None:
    """Parse the arguments and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a glob on the networks' names")
    parser.add_argument("--cases", type=Path, help="a folder of builders, each named as in CASES")
    parser.add_argument("--write", action="store_true", help="write the table into docs/networks.md")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    # Networks are checked in copies of a process that has imported all modules; Python before 3.12 passes the import
    # path to it only through the environment.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preload"])
    cases = options.cases.absolute() if options.cases else None
    results: list[tuple[Entry, dict[str, Any]]] = []
    print(HEADER, flush=True)
    chosen = [entry for entry in entries(cases) if fnmatch.fnmatchcase(entry.label, options.only)]
    with ThreadPoolExecutor(options.processes) as pool:
        for entry, found in zip(chosen, pool.map(run, chosen), strict=True):
            results.append((entry, found))
            print(line(entry, found), flush=True)
    print(f"\n{summary(results)}")
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        table = "\n".join([summary(results), "", HEADER, *(line(*result) for result in results)])
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    sys.exit(any("error" in found or found["wrong"] for _, found in results))


if __name__ == "__main__":
    main()
