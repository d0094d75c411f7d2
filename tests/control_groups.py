"""Control groups with a memory limit, as files below a folder of a test's own."""

MIB = 1 << 20
GIB = 1 << 30


def limit_files(root, version, limit, usage=0, inactive=0, group="/job", top="/"):
    """What the kernel shows of a control group with a memory limit, below `root`."""
    inside = "" if group == top else group.removeprefix(top.rstrip("/"))
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text("MemTotal: 999999999 kB\nMemAvailable:   99999999 kB\n")
    if version == 1:
        folder = root / "sys/fs/cgroup/memory"
        mounts = f"36 25 0:31 {top} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
        groups = f"9:name=systemd:/\n4:cpu,memory:{group}\n0::/\n"
        files = {
            "memory.limit_in_bytes": limit,
            "memory.usage_in_bytes": usage,
            "memory.stat": f"inactive_file 0\ntotal_inactive_file {inactive}",
        }
        unlimited = "9223372036854771712"
    else:
        folder = root / "sys/fs/cgroup"
        mounts = f"30 24 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
        groups = f"0::{group}\n"
        files = {
            "memory.max": limit,
            "memory.current": usage,
            "memory.stat": f"anon 1\nfile {inactive}\ninactive_file {inactive}",
        }
        unlimited = "max"
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/a rw\n" + mounts)
    (root / "proc/self/cgroup").write_text(groups)
    place = folder / inside.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (place / name).write_text(f"{value}\n")
    if inside and version == 1:  # the group above has no limit
        (folder / "memory.limit_in_bytes").write_text(unlimited + "\n")
    return place
