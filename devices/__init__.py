"""Board profiles, board detection, the smoke test, and its emulation with QEMU (`edgelm devices`)."""
