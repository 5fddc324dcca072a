"""The twenty corruptions x five severities on 112 x 112 faces, one core, against what people use today.

    python tests/performance/corruptions.py --peers oracle/bin/python

`oracle` is the environment of tests/fixtures/imagecorruptions/make.py with `pip install albumentations==2.0.8`.
On a GPU (`--device cuda`) it needs no peers, uses all processors for JPEG and drops of water, and adds the share of the
memory's bandwidth and whether the target of 20,000 images a second, of all twenty together, is met. Medians of
milliseconds of processor time an image, on a GPU of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cluster.report import machine, write_json  # noqa: E402
from cluster.tracking import git_commit  # noqa: E402
from jobs.oodface.corruptions import CORRUPTIONS  # noqa: E402
from jobs.oodface.randomness import keys  # noqa: E402
from jobs.oodface.scenario import SEVERITIES  # noqa: E402
from jobs.oodface.scenarios import distort  # noqa: E402
from jobs.oodface.threads import use_threads  # noqa: E402
from tests.performance.corruption_peers import face_like  # noqa: E402

SIDE = 112
PEERS = ("imagecorruptions", "albumentations")
TARGET = 20_000  # images a second on an H100, mean over the twenty and their severities


def main() -> None:
    """Measures, prints a table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help="Python of the environment with imagecorruptions and albumentations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5, help="a measurement")
    parser.add_argument("--names", nargs="+", default=[one.name for one in CORRUPTIONS])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    use_threads(len(os.sched_getaffinity(0)) if device.type == "cuda" else 1)
    images = torch.from_numpy(face_like()).permute(2, 0, 1)[None].float().div(255).to(device)
    images = images.repeat(arguments.batch, 1, 1, 1)
    peers = None
    if arguments.peers is not None:
        command = [arguments.peers, Path(__file__).with_name("corruption_peers.py")]
        peers = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    found = {}
    for name in arguments.names:
        rows = {"rayward": []} | {peer: [] for peer in PEERS if peers} | {"kornia": []}
        for severity in SEVERITIES:
            rows["rayward"].append(ours(images, name, severity, arguments.seconds))
            for peer in PEERS if peers else ():
                rows[peer].append(asked(peers, peer, name, severity, arguments.seconds))
            rows["kornia"].append(kornia(images, name, severity, arguments.seconds))
        found[name] = {who: [one and float(f"{one:.4g}") for one in row] for who, row in rows.items()}
        print(told(name, found[name]), flush=True)
    if peers is not None:
        peers.stdin.close()
        peers.wait(60)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git_commit(ROOT),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}),
        "batch": arguments.batch,
        "milliseconds": found,
        "summary": summary(found, images, device),
    }
    print(json.dumps(record["summary"], indent=1))
    if "target" in record["summary"]:
        met = "met" if record["summary"]["target"]["met"] else "not met"
        print(f"target of {TARGET} images/s: {met}, with {record['summary']['mean_images_per_second']}")
    if arguments.out:
        write_json(record, arguments.out)


def timed(call, images: torch.Tensor, seconds: float) -> float:
    """Median milliseconds an image."""
    wait = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    clock = time.perf_counter if images.is_cuda else time.process_time  # of one thread: others cost it no time
    call()
    wait()
    times, until = [], clock() + seconds
    while clock() < until or len(times) < 3:
        start = clock()
        call()
        wait()
        times.append(clock() - start)
    return median(times) / len(images) * 1e3


def ours(images: torch.Tensor, name: str, severity: int, seconds: float) -> float:
    """Draws included, a new key an image, cut to 8 bits as the peers' results are."""
    drawn = keys([str(one) for one in range(len(images))], name, severity)
    return timed(lambda: distort(images, name, severity, drawn, truncate=True), images, seconds)


def kornia(images: torch.Tensor, name: str, severity: int, seconds: float) -> float | None:
    """kornia's nearest augmentation; most compute something else."""
    import kornia.augmentation as K

    strength = severity / 5
    nearest = {
        "brightness": lambda: K.RandomBrightness((1 + strength / 2,) * 2, p=1),
        "contrast": lambda: K.RandomContrast((0.5,) * 2, p=1),
        "saturate": lambda: K.RandomSaturation((2.0,) * 2, p=1),
        "fog": lambda: K.RandomPlasmaBrightness(p=1),
        "snow": lambda: K.RandomSnow(p=1),
        "color_shift": lambda: K.RandomHue((-0.5, 0.5), p=1),
        "motion_blur": lambda: K.RandomMotionBlur((21, 31, 31, 31, 41)[severity - 1], 45.0, 0.0, p=1),
        "gaussian_noise": lambda: K.RandomGaussianNoise(std=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1], p=1),
        "salt_pepper_noise": lambda: K.RandomSaltAndPepperNoise(amount=0.06 * severity, p=1),
        "jpeg_compression": lambda: K.RandomJPEG(float((25, 18, 15, 10, 7)[severity - 1]), p=1),
        "random_occlusion": lambda: K.RandomErasing((0.1, 0.1), p=1),
        "defocus_blur": lambda: K.RandomBoxBlur(((7, 9, 13, 17, 21)[severity - 1],) * 2, p=1),
    }
    if name not in nearest:
        return None
    augmentation = nearest[name]()
    return timed(lambda: augmentation(images), images, seconds)


def asked(peers: subprocess.Popen, peer: str, name: str, severity: int, seconds: float) -> float | None:
    """What the other process measured."""
    peers.stdin.write(json.dumps({"peer": peer, "name": name, "severity": severity, "seconds": seconds}) + "\n")
    peers.stdin.flush()
    answer = peers.stdout.readline()
    if not answer:
        raise SystemExit(f"the peers' process ended at {peer} {name}; run its environment's imports by hand")
    return json.loads(answer)


def ratio(row: dict, peer: str) -> float | None:
    """Geometric mean over the severities of the peer's time by ours: above 1 we are faster."""
    pairs = [(theirs, mine) for theirs, mine in zip(row.get(peer, []), row["rayward"], strict=False) if theirs]
    return geometric_mean([theirs / mine for theirs, mine in pairs]) if pairs else None


def told(name: str, row: dict) -> str:
    """A line of the table."""
    ratios = "  ".join(f"{peer} {value:6.2f}x" for peer in (*PEERS, "kornia") if (value := ratio(row, peer)))
    return f"{name:20} {' '.join(f'{one:7.3f}' for one in row['rayward'])} ms   {ratios}"


def summary(found: dict, images: torch.Tensor, device: torch.device) -> dict:
    """Geometric means over the scenarios, the worst cells, images a second."""
    result: dict = {}
    for peer in (*PEERS, "kornia"):
        by_name = {name: value for name, row in found.items() if (value := ratio(row, peer))}
        if by_name:
            result[peer] = {
                "geometric_mean": round(geometric_mean(by_name.values()), 2),
                "below_1": {name: round(value, 2) for name, value in by_name.items() if value < 1},
            }
    speeds = {name: len(row["rayward"]) * 1e3 / sum(row["rayward"]) for name, row in found.items()}
    result["images_per_second"] = {name: round(value) for name, value in speeds.items()}
    result["mean_images_per_second"] = round(
        len(speeds) * len(SEVERITIES) * 1e3 / sum(sum(row["rayward"]) for row in found.values())
    )
    if device.type == "cuda":
        moved = 2 * 3 * SIDE * SIDE * 4  # bytes that the cheapest scenario must move an image
        peak = bandwidth(device)
        result["share_of_bandwidth"] = {name: round(value * moved / peak, 4) for name, value in speeds.items()}
        result["bandwidth_gb_per_second"] = round(peak / 1e9)
        result["target"] = {"images_per_second": TARGET, "met": result["mean_images_per_second"] >= TARGET}
    return result


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy of 1 GiB reads and writes."""
    block = torch.empty(1 << 28, device=device)
    other = torch.empty_like(block)
    milliseconds = timed(lambda: other.copy_(block), block[:1], 1.0)
    return 2 * block.numel() * 4 / (milliseconds / 1e3)


if __name__ == "__main__":
    main()
