"""The worker, by its process."""

from test_jobworker import ScriptedWorker, Server, Stage, Worker, stage, until  # noqa: F401


def leaves_at_once(stage: Stage, worker: Worker, job: int) -> bool:  # noqa: F811
    """Whether a worker has exited though `docker run` blocked a thread of it, and the container runs on."""
    assert worker.exit_code() == 1
    return stage.docker.starts(job) == 1 and len(stage.docker.containers()) == 1 and not stage.docker.ledger("end", job)


class TestGivingUp:
    """A worker that gives up leaves at once; its container runs on."""

    def with_a_job(self, stage: Stage) -> tuple[Server, Worker, int]:  # noqa: F811
        server = stage.server()
        worker = stage.worker(server)
        job = server.sh("sleep 1000")
        until(lambda: stage.docker.starts(job) == 1)
        return server, worker, job

    def test_one_that_is_replaced(self, stage: Stage) -> None:  # noqa: F811
        server, worker, job = self.with_a_job(stage)
        with ScriptedWorker(server, "worker", jobs=((job, 1, "running"),)):
            assert leaves_at_once(stage, worker, job)
        assert worker.said("another worker named worker connected")

    def test_one_that_the_server_refuses(self, stage: Stage) -> None:  # noqa: F811
        server, worker, job = self.with_a_job(stage)
        tokens = stage.folder / "tokens"
        tokens.write_text("worker secret\napi other\n")
        server.kill()
        server.command[2:2] = ["--token-file", str(tokens)]
        server.start()
        assert leaves_at_once(stage, worker, job)
        assert worker.said("refuses this worker: HTTP 401")
