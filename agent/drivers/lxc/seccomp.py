"""The system calls which containers are refused: LXC's own list, and what would escape a disk limit."""

from __future__ import annotations

from pathlib import Path

# LXC's /usr/share/lxc/config/common.seccomp.
_REFUSED = ("kexec_load", "open_by_handle_at", "init_module", "finit_module", "delete_module")
# <linux/btrfs.h>: a subvolume made inside is not counted by the quota group of the one around it. The others serve real
# root (a privileged container) only: it could change quota groups, delete any subvolume of the pool by its number, or
# change the pool itself.
IOCTLS = {
    "BTRFS_IOC_SNAP_CREATE": 0x50009401,
    "BTRFS_IOC_RESIZE": 0x50009403,
    "BTRFS_IOC_ADD_DEV": 0x5000940A,
    "BTRFS_IOC_RM_DEV": 0x5000940B,
    "BTRFS_IOC_BALANCE": 0x5000940C,
    "BTRFS_IOC_SUBVOL_CREATE": 0x5000940E,
    "BTRFS_IOC_SNAP_DESTROY": 0x5000940F,
    "BTRFS_IOC_DEFAULT_SUBVOL": 0x40089413,
    "BTRFS_IOC_SNAP_CREATE_V2": 0x50009417,
    "BTRFS_IOC_SUBVOL_CREATE_V2": 0x50009418,
    "BTRFS_IOC_BALANCE_V2": 0xC4009420,
    "BTRFS_IOC_QUOTA_CTL": 0xC0109428,
    "BTRFS_IOC_QGROUP_ASSIGN": 0x40189429,
    "BTRFS_IOC_QGROUP_CREATE": 0x4010942A,
    "BTRFS_IOC_QGROUP_LIMIT": 0x8030942B,
    "BTRFS_IOC_DEV_REPLACE": 0xCA289435,
    "BTRFS_IOC_RM_DEV_V2": 0x5000943A,
    "BTRFS_IOC_SNAP_DESTROY_V2": 0x5000943F,
}
# The kernel takes the low 32 bits of ioctl's request only; a plain comparison would look at all 64.
_LOW = 0xFFFFFFFF


def profile() -> str:
    """The profile's text; `[all]` also covers 32-bit and x32 calls on a 64-bit kernel."""
    lines = ["2", "denylist", "reject_force_umount", "[all]"]
    lines += [f"{name} errno 1" for name in _REFUSED]
    lines += [f"ioctl errno 1 [1,{request:#x},SCMP_CMP_MASKED_EQ,{_LOW:#x}]" for request in IOCTLS.values()]
    return "\n".join(lines) + "\n"


def write(file: Path) -> None:
    """Write the profile in one step."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(profile())
    new.replace(file)
