"""Ten times as long, ten times as many: the peak of a process must not see it."""
import subprocess
import sys
import textwrap


def check_peak_is_flat(
    folder,  # an empty folder
    write,  # write(path, frames, size=(height, width), seed=...) makes a video
    program,  # Python source: for each folder in sys.argv[2:], work with the cache folder sys.argv[1] and print "frames peak_kB"
    size,  # (height, width)
):
    "Assert that a clip ten times as long, and ten clips for one, take at most 1.1 times the peak."
    write(folder / "short" / "clip.mp4", 40, size=size)
    write(folder / "warm" / "clip.mp4", 80, size=size, seed=20)  # buffers of fixed size are filled, whatever comes after
    write(folder / "long" / "clip.mp4", 400, size=size)
    for number in range(10):
        write(folder / "many" / f"{number}.mp4", 40, size=size, seed=1 + number)
    folders = [str(folder / name) for name in ("warm", "short", "long", "many")]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(folder / "cache"), *folders], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    _, (frames, base), *rest = [[int(number) for number in line.split()] for line in run.stdout.splitlines()]
    for name, (more, peak) in zip(("long", "many"), rest, strict=True):
        assert more == 10 * frames
        assert peak < 1.1 * base, f"{name}: {peak} kB against {base} kB"
