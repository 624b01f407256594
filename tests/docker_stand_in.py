"""As much of docker as client.py needs: a container is a local process, its state a folder.

    python tests/docker_stand_in.py FOLDER     lay out FOLDER: a `docker` to be put first on PATH, and all it needs

What happens is noted in FOLDER/ledger; FOLDER/down is an engine that is not there, FOLDER/VERB-delay a slow one,
FOLDER/refuse what it says instead of anything else, FOLDER/busy-NAME a container that it does not remove,
FOLDER/hang-NAME one of which a removal never ends, and FOLDER/mute-NAME one that can't be inspected. A worker starts
this program for each of its calls, so it imports little, and its byte code is made beforehand.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Iterable
    from typing import Any, BinaryIO, NoReturn

HERE = os.path.dirname(os.path.abspath(sys.argv[0])) + "/"  # where the `docker` lies that was called
BOXES = HERE + "containers/"
RUN_FLAGS = "--init --rm -i -t --interactive --tty --privileged --read-only --oom-kill-disable"


def main(verb: str, *words: str) -> None:
    if os.path.exists(HERE + "down"):
        fail("Cannot connect to the Docker daemon. Is the docker daemon running?", 125 if verb == "run" else 1)
    if (refusal := read(HERE + "refuse", "")) and verb != "--shim":
        fail(refusal, 125 if verb == "run" else 1)
    if verb in ("container", "image") and words:
        verb, words = words[0] if verb == "container" else verb + " " + words[0], words[1:]
    seconds = float(read(HERE + verb + "-delay", "0") or 0)  # before it is seen, for who then takes the delay away
    ledger("call", verb, os.getpid())
    time.sleep(seconds)
    verbs: dict[str, Any] = {
        "run": run,
        "rm": rm,
        "pull": pull,
        "inspect": inspect,
        "image inspect": image_inspect,
        "ps": ps,
        "ls": ps,
        "kill": kill,
        "stop": stop,
        "start": start,
        "--shim": shim,
        "wait": wait,
        "logs": logs,
    }
    if verb in verbs:
        verbs[verb](*words)


def fail(text: str, code: int = 1) -> NoReturn:
    sys.stderr.write("docker: " + text + "\n")
    sys.stderr.flush()
    os._exit(code)


def read(path: str, default: str | None = None) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        if default is None:
            raise
        return default


def write(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.rename(path + ".new", path)


def ledger(event: str, name: str, *details: object) -> None:
    line = "\t".join([event, name, *map(str, details)]).replace("\n", " ") + "\n"
    file = os.open(HERE + "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, line.encode(errors="surrogateescape"))
    os.close(file)


def split(words: Iterable[str], flags: str = "") -> tuple[dict[str, list[str]], list[str]]:
    """Options, each with its values, and what stands behind them; the flags take no value."""
    options: dict[str, list[str]] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        word, equals, value = rest.pop(0).partition("=")
        if word == "--":
            break
        if not equals and word not in flags.split():
            value = rest.pop(0)
        options.setdefault(word, []).append(value)
    return options, rest


def run(*words: str) -> None:
    options, (image, *_command) = split(words, RUN_FLAGS)
    name = options["--name"][0]
    own = [os.environ.get(key, "") for key in ("DOCKER_HOST", "DOCKER_CONFIG", "PATH", "HOME", "LD_PRELOAD")]
    ledger("run", name, os.getpid(), "|".join(own), *words)
    if image not in read(HERE + "images").split():
        fail("Error response from daemon: No such image: " + image, 125)
    new = f"{BOXES}.{name}{os.getpid()}"
    os.mkdir(new)
    write(new + "/argv", "\0".join(words))
    write(new + "/log", "")
    try:
        os.rename(new, BOXES + name)
    except OSError:
        fail(f'Error response from daemon: Conflict. The container name "/{name}" is already in use.', 125)
    time.sleep(float(read(HERE + "start-delay", "0") or 0))
    box = BOXES + name + "/"
    attached = start(name)
    if attached is None:
        os.write(1, open(box + "log", "rb").read())
        os._exit(137 if image == "oom" else 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signal_group(int(read(box + "pid", "0")), number))
    follow(open(box + "log", "rb"), attached)


def start(name: str) -> int | None:
    """Start what is created; the pipe on which its end will be told, None where it has ended already."""
    box = box_of(name)
    if os.path.exists(box + "pid") or os.path.exists(box + "exit"):
        return None
    _, (image, *command) = split(read(box + "argv").split("\0"), RUN_FLAGS)
    log = os.open(box + "log", os.O_WRONLY | os.O_APPEND)
    if image != "busybox" or command == ["true"]:
        if image == "hello-world":
            os.write(log, b"Hello from Docker!\n")
        ledger("start", name, os.getpid())
        finish(box, name, 137 if image == "oom" else 0, image == "oom")
        return None
    attached, ended = os.pipe()
    if os.fork() == 0:
        os.close(attached)
        for file in (log, ended):
            os.set_inheritable(file, True)
        # By its own command line: this is not `docker run` any more.
        os.execv(HERE + "docker", [HERE + "docker", "--shim", name, str(log), str(ended)])
    os.close(ended)
    return attached


def shim(name: str, log: str, attached: str) -> None:
    """The container's parent: outlives the attached docker, keeps the exit code."""
    os.setsid()
    box, output, told = BOXES + name + "/", int(log), int(attached)
    options, (_, *command) = split(read(box + "argv", "busybox").split("\0"), RUN_FLAGS)
    environment = environment_of(name, options)  # it may come from stdin
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.close(go)
        if not os.read(ready, 1):
            os._exit(0)
        become(command, environment, output)
    try:
        with Locked(box):
            if os.path.exists(box + "pid"):
                os._exit(0)
            write(box + "pid", str(pid))
            ledger("start", name, pid)
            os.write(go, b"1")
    except OSError:
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 128 - code if code < 0 else code
    signal_group(pid, signal.SIGKILL)
    finish(box, name, code, False)
    try:
        os.write(told, str(code).encode())
    except OSError:
        pass
    os._exit(0)


def environment_of(name: str, options: dict[str, list[str]]) -> dict[str, str]:
    """What the container's program finds in its environment."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOSTNAME": name}
    words = [line for path in options.get("--env-file", []) for line in read(path).splitlines()]
    for word in words + options.get("--env", []) + options.get("-e", []):
        key, equals, value = word.partition("=")
        if equals or key in os.environ:
            environment[key] = value if equals else os.environ[key]
    return environment


def become(command: list[str], environment: dict[str, str], output: int) -> NoReturn:
    """Let this process be the container's program."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    os.chdir("/")
    try:
        os.execvpe(command[0], command, environment)
    except OSError:
        os.write(2, b"exec: no such file\n")
        os._exit(127)


def finish(box: str, name: str, code: int, oom: bool) -> None:
    ledger("end", name, code)
    try:
        write(box + "exit", f"{code} {oom:d}")
    except OSError:
        pass


def follow(log: BinaryIO, ended: int) -> NoReturn:
    """Copy the log to stdout until the pipe says how the container ended."""
    import select

    while True:
        done = select.select([ended], [], [], 0.01)[0]
        while data := log.read(65536):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        if done:
            code = os.read(ended, 9)
            os._exit(int(code) if code else 125)


class Locked:
    """Starting and removing a container exclude each other."""

    def __init__(self, box: str) -> None:
        self.file = os.open(box, os.O_RDONLY)

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self.file)


def box_of(name: str) -> str:
    if not os.path.isdir(BOXES + name):
        fail("Error response from daemon: No such container: " + name)
    return BOXES + name + "/"


def signal_group(pid: int, number: int) -> None:
    try:
        if pid:
            os.killpg(pid, number)
    except ProcessLookupError:
        pass


def is_running(box: str) -> bool:
    return os.path.exists(box + "pid") and not os.path.exists(box + "exit")


def wait_for_end(box: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_running(box) and time.monotonic() < deadline:
        time.sleep(0.01)


def rm(*words: str) -> NoReturn:
    options, names = split(words, "-f --force -v --volumes -fv -vf")
    code = 0
    for name in names:
        box = BOXES + name + "/"
        if not os.path.isdir(box):
            sys.stderr.write(f"Error: No such container: {name}\n")
            code = 1
            continue
        if os.path.exists(HERE + "hang-" + name):
            time.sleep(1000)
        if os.path.exists(HERE + "busy-" + name):
            sys.stderr.write(f"Error response from daemon: container {name}: device or resource busy\n")
            code = 1
            continue
        gone = f"{BOXES}.gone{os.getpid()}"
        try:
            with Locked(box):
                if is_running(box):
                    if not {"-f", "--force", "-fv", "-vf"} & set(options):
                        fail("You cannot remove a running container")
                    signal_group(int(read(box + "pid")), signal.SIGKILL)
                    wait_for_end(box, 5)
                os.rename(box, gone)
        except OSError:
            continue
        ledger("remove", name)
        for file in os.listdir(gone):
            os.unlink(gone + "/" + file)
        os.rmdir(gone)
        print(name)
    sys.exit(code)


def pull(*words: str) -> None:
    image = split(words, "-q --quiet")[1][0]
    ledger("pull", image)
    if image not in read(HERE + "registry", "").split():
        fail(f"Error response from daemon: manifest for {image} not found: manifest unknown")
    with open(HERE + "images", "a") as file:
        file.write(image + "\n")


def state(box: str) -> dict[str, Any]:
    code, oom = read(box + "exit", "0 0").split()
    status = "exited" if os.path.exists(box + "exit") else "running" if os.path.exists(box + "pid") else "created"
    return {
        "Status": status,
        "Running": status == "running",
        "Pid": int(read(box + "pid", "0")),
        "Error": "",
        "ExitCode": int(code),
        "OOMKilled": oom == "1",
        "StartedAt": time_of(box + "pid"),
        "FinishedAt": time_of(box + "exit"),
    }


def time_of(path: str) -> str:
    seconds = os.stat(path).st_mtime if os.path.exists(path) else -62135596800
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e9):09d}Z"


def description(name: str) -> dict[str, Any]:
    box = BOXES + name + "/"
    options, (image, *_command) = split(read(box + "argv").split("\0"), RUN_FLAGS)
    labels = dict(label.partition("=")[::2] for label in options.get("--label", []) + options.get("-l", []))
    return {
        "Id": name,
        "Name": "/" + name,
        "State": state(box),
        "Config": {"Labels": labels, "Image": image},
        "Created": "2026-11-24T08:00:00.123456789Z",
        "RestartCount": 0,
    }


def render(template: str, value: Any) -> str:
    import json
    import re

    def look(path: str, value: Any) -> Any:
        for key in filter(None, path.split(".")):
            value = value[key]
        return value

    def fill(match: re.Match[str]) -> str:
        words = match[1].replace('"', "").split()
        if words[0] == "json":
            return json.dumps(look(words[1], value))
        if words[0] == ".Label":
            return str(value["labels"].get(words[1], ""))
        if words[0] == "index":
            return str(look(words[1], value).get(words[2], ""))
        found = look(words[0], value)
        return str(found).lower() if isinstance(found, bool) else str(found)

    return re.sub("{{ *(.*?) *}}", fill, template.replace("\\t", "\t"))


def inspect(*words: str) -> None:
    import json

    options, names = split(words)
    template = (options.get("--format") or options.get("-f") or [""])[0]
    for name in names:
        while os.path.exists(HERE + "mute-" + name):
            time.sleep(0.01)
    found = [description(name) for name in names if os.path.isdir(BOXES + name)]
    print(json.dumps(found) if not template else "\n".join(render(template, one) for one in found))
    for name in names:
        if not os.path.isdir(BOXES + name):
            sys.stdout.flush()
            fail("Error: No such object: " + name)


def image_inspect(*words: str) -> None:
    for image in split(words)[1]:
        if image not in read(HERE + "images").split():
            print("[]", flush=True)
            fail("Error: No such image: " + image)
    print('[{"Id": "sha256:1"}]')


def ps(*words: str) -> None:
    import json

    options, _ = split(words, "-a --all -q --quiet --no-trunc -aq")
    wanted = options.get("--filter", []) + options.get("-f", [])
    for name in sorted(os.listdir(BOXES)):
        if name.startswith("."):
            continue
        try:
            one = description(name)
        except OSError:
            continue
        labels, status = one["Config"]["Labels"], one["State"]["Status"]
        if not {"-a", "--all", "-aq"} & set(options) and status != "running":
            continue
        if all(matches(each.partition("=")[2], labels) for each in wanted if each.startswith("label=")):
            flat = {
                "Names": name,
                "ID": name,
                "State": status,
                "Status": status,
                "Image": one["Config"]["Image"],
                "labels": labels,
                "Labels": ",".join(map("=".join, labels.items())),
            }
            flat[""] = flat
            template = options.get("--format", ["{{.ID}}"])[0]
            print(json.dumps(flat) if template == "json" else render(template, flat))


def matches(wanted: str, labels: dict[str, str]) -> bool:
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


def kill(*words: str) -> None:
    options, names = split(words)
    for name in names:
        box = box_of(name)
        if not is_running(box):
            fail(f"Error response from daemon: Container {name} is not running")
        number = (options.get("--signal") or options.get("-s") or ["KILL"])[0]
        ledger("kill", name, number)
        os.kill(int(read(box + "pid")), getattr(signal, "SIG" + number.removeprefix("SIG")))


def stop(*words: str) -> None:
    options, names = split(words)
    seconds = float((options.get("--time") or options.get("-t") or options.get("--timeout") or ["10"])[0])
    for name in names:
        box = box_of(name)
        ledger("stop", name, seconds)
        if not is_running(box):
            continue
        os.kill(int(read(box + "pid")), signal.SIGTERM)
        wait_for_end(box, seconds)
        if is_running(box):
            signal_group(int(read(box + "pid")), signal.SIGKILL)
            wait_for_end(box, 5)


def wait(*words: str) -> None:
    for name in split(words)[1]:
        box = box_of(name)
        while not os.path.exists(box + "exit"):
            if not os.path.isdir(box):
                fail("Error response from daemon: No such container: " + name)
            time.sleep(0.01)
        print(read(box + "exit").split()[0])


def logs(*words: str) -> None:
    options, (name, *_) = split(words, "-f --follow -t --timestamps")
    box = box_of(name)
    log = open(box + "log", "rb")
    while True:
        last = not is_running(box)
        sys.stdout.buffer.write(log.read())
        sys.stdout.buffer.flush()
        if last or not ("--follow" in options or "-f" in options):
            return
        time.sleep(0.01)


def install(folder: str) -> None:
    """Lay out a folder for a stand-in of its own."""
    import compileall

    os.makedirs(folder + "/containers")
    write(folder + "/images", "hello-world busybox oom\n")
    here = os.path.dirname(os.path.abspath(__file__))
    compileall.compile_file(here + "/docker_stand_in.py", quiet=1)  # with this, a call takes 10 ms, without 16
    start = f"import sys; sys.path.insert(0, {here!r}); import docker_stand_in; docker_stand_in.main(*sys.argv[1:])"
    write(folder + "/docker", f"#!{os.path.realpath(sys.executable)} -IS\n{start}\n")
    os.chmod(folder + "/docker", 0o755)


if __name__ == "__main__":
    install(sys.argv[1])
