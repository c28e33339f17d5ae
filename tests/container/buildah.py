"""Runs buildah with all images and containers in one directory, without daemon or registry."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.container.pip_settings import PipSettings

Finished = subprocess.CompletedProcess[str]


def command(
    *words: str | Path, env: Mapping[str, str] | None = None, check: bool = True
) -> Finished:
    """Run a command; return stdout and stderr as one text.

    Raises:
        AssertionError: it failed, and `check` is set; with the last lines of its output.
    """
    finished = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    if check and finished.returncode != 0:
        last = "\n".join(finished.stdout.splitlines()[-40:])
        raise AssertionError(f"{finished.args} ended with status {finished.returncode}:\n{last}")
    return finished


class Store:
    """Manages images and containers in `work`, with the settings that buildah needs."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.settings = PipSettings.of_this_machine()
        self.environment = {**os.environ, "TMPDIR": str(work / "tmp")}
        """Caches of build steps and layers on their way go below `work` too."""
        (work / "tmp").mkdir(mode=0o1777)
        self.policy = work / "policy.json"
        self.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.secret = work / "pip.conf"
        self.secret.touch(mode=0o600)
        self.secret.write_text(self.settings.text)
        self.driver = "overlay" if self._has_overlay() else "vfs"
        """Layers share what they have in common, where the kernel mounts it; vfs copies them."""

    def _has_overlay(self) -> bool:
        layers = {name: self.work / name for name in ("lower", "upper", "scratch", "merged")}
        for layer in layers.values():
            layer.mkdir()
        options = "lowerdir={lower},upperdir={upper},workdir={scratch}".format(**layers)
        mount = ("mount", "-t", "overlay", "overlay", "-o", options, layers["merged"])
        if command(*mount, check=False).returncode != 0:
            return False
        command("umount", layers["merged"])
        return True

    def __call__(self, verb: str, *words: str | Path, check: bool = True) -> Finished:
        store = ("--root", self.work / "layers", "--runroot", self.work / "run")
        return command(
            *("buildah", *store, "--storage-driver", self.driver, verb, *words),
            env=self.environment,
            check=check,
        )

    def build(self, image: str, context: Path, *words: str | Path) -> None:
        """Build `image` from `context`; pip settings are mounted during the build, not copied."""
        lent = [f"--volume={path}:{path}:ro" for path in self.settings.paths]
        self(
            "build",
            *("--isolation", "chroot", "--pull-never", "--network", "host"),
            *("--signature-policy", self.policy, "--secret", f"id=pip.conf,src={self.secret}"),
            *(*lent, *words, "--tag", image, context),
        )

    def start(self, image: str) -> "Container":
        """Create a container of `image` without starting anything in it."""
        word = ("--pull-never", "--signature-policy", self.policy)
        name = self("from", *word, image).stdout.split()[-1]
        return Container(self, image, name)

    def commit(self, container: "Container", image: str) -> None:
        """Commit `container` as `image`, and remove the container."""
        self("commit", "-q", "--signature-policy", self.policy, container.name, image)
        self("rm", container.name)

    def remove(self) -> None:
        """Remove everything; unmount first, so that nothing is deleted through a mount."""
        if shutil.which("buildah"):
            self("rm", "--all", check=False)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((m for m in mounts if Path(m).is_relative_to(self.work)), reverse=True):
            command("umount", mount)
        shutil.rmtree(self.work)


@dataclass(frozen=True)
class Container:
    """Runs commands in a container the way a container engine does."""

    store: Store
    image: str
    name: str

    @cached_property
    def files(self) -> Path:
        """Return its root directory on this machine."""
        return Path(self.store("mount", self.name).stdout.strip())

    def path(self, inside: str) -> Path:
        """Return the path on this machine of its absolute path `inside`."""
        return self.files / inside.lstrip("/")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return its image's configuration: User, Env, Entrypoint, Labels, ..."""
        report = self.store("inspect", "--type", "image", self.image).stdout
        config: dict[str, Any] = json.loads(report)["OCIv1"]["config"]
        return config

    def run(
        self, *words: str, options: Sequence[str] = (), check: bool = True, entry: bool = True
    ) -> Finished:
        """Run the entry point with `words`; `options` are passed to buildah run."""
        # Container engines add the container's name to /etc/hosts; buildah does not.
        how = ("--isolation", "chroot", "--hostname", "localhost", *options)
        first = self.config["Entrypoint"] if entry else []
        return self.store("run", *how, self.name, "--", *first, *words, check=check)
