"""What a process learns of its world from torchrun, srun or nobody; a world of one needs no process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dino_dist.dist import ProcessEnvironment, World, joined_world
from dino_dist.errors import SaidByRankZero, StopAsked, UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[0-2]",
    "SLURMD_NODENAME": "node1",
}


@pytest.mark.parametrize("broken", [{"RANK": "x"}, {"LOCAL_RANK": ""}, {"MASTER_PORT": "http"}], ids=str)
def test_a_variable_that_is_no_number_is_one_line(broken: dict[str, str]) -> None:
    with pytest.raises(UserError, match="incomplete"):
        ProcessEnvironment.read(TORCHRUN | broken)


def test_srun_without_its_variables_is_one_line() -> None:
    incomplete = {name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        ProcessEnvironment.read(incomplete)


def test_nobody_means_one_rank() -> None:
    environment = ProcessEnvironment.read({})
    assert environment == ProcessEnvironment()
    assert (environment.rank, environment.size, environment.master_port) == (0, 1, 0)


def test_torchrun() -> None:
    environment = ProcessEnvironment.read(TORCHRUN)
    assert (environment.rank, environment.size, environment.local_rank, environment.local_size) == (5, 8, 1, 4)
    assert (environment.master_addr, environment.master_port) == ("node0", 29400)
    assert not environment.serve_store  # its agent does
    assert environment.job_id is None


def test_a_launcher_without_agent_lets_rank_zero_serve() -> None:
    environment = ProcessEnvironment.read(
        {key: value for key, value in TORCHRUN.items() if "ELASTIC" not in key} | {"MASTER_LISTEN_FD": "7"}
    )
    assert environment.serve_store
    assert environment.master_listen_fd == 7


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_a_rendezvous_is_refused(missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        ProcessEnvironment.read({key: value for key, value in TORCHRUN.items() if key != missing})


def test_srun() -> None:
    environment = ProcessEnvironment.read(SRUN)
    assert (environment.rank, environment.size, environment.local_rank) == (3, 5, 1)
    assert (environment.job_id, environment.restarts, environment.host) == ("4711", 0, "node1")
    assert environment.serve_store
    assert environment.master_addr == ""  # it is read from the run folder


@pytest.mark.parametrize(
    ("tasks", "node", "count"),
    [("8", "0", 8), ("2(x2),1", "1", 2), ("2(x2),1", "2", 1), ("1,4(x3),2", "0", 1), ("1,4(x3),2", "3", 4)],
)
def test_srun_tasks_on_this_node(tasks: str, node: str, count: int) -> None:
    environ = SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    assert ProcessEnvironment.read(environ).local_size == count


def test_each_start_of_a_job_has_a_name_of_its_own_that_all_ranks_know() -> None:
    def start(**more: str) -> str:
        return ProcessEnvironment.read(SRUN | more).start

    assert len({start(SLURM_PROCID=str(rank)) for rank in range(1, 5)}) == 1
    starts = {start(), start(SLURM_RESTART_COUNT="1"), start(SLURM_STEP_ID="1"), start(SLURM_JOB_ID="12")}
    assert len(starts) == 4


def test_a_task_of_a_job_array_is_a_job_of_its_own() -> None:
    """The last one has the array's own number as SLURM_JOB_ID, which names all of them."""
    environ = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}
    assert ProcessEnvironment.read(SRUN | environ).job_id == "4711_2"


def test_a_given_address_and_port_are_taken() -> None:
    environment = ProcessEnvironment.read(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (environment.master_addr, environment.master_port, environment.start) == ("10.0.0.1", 1234, "")


def test_one_task_under_slurm_is_one_rank_of_a_job() -> None:
    environment = ProcessEnvironment.read({"SLURM_JOB_ID": "12", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert (environment.size, environment.master_port, environment.job_id) == (1, 0, "12")


def test_torchrun_inside_a_job_is_torchruns_world_and_slurms_job() -> None:
    environment = ProcessEnvironment.read(SRUN | TORCHRUN)
    assert (environment.rank, environment.size, environment.job_id) == (5, 8, "4711")


def test_a_world_of_one_communicates_with_itself() -> None:
    world, tensor = World(), torch.arange(3.0)
    assert world.is_first
    assert world.all_reduce_sum_(tensor) is tensor
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert world.broadcast({"a": 1}) == {"a": 1}
    assert world.gather("x") == ["x"]
    assert world.first(lambda: 7) == 7
    world.barrier()


def test_what_rank_zero_finds_wrong_is_wrong_for_a_world_of_one() -> None:
    def wrong() -> None:
        raise UserError("data.train=x does not exist")

    with pytest.raises(UserError, match=r"data\.train=x"):
        World().first(wrong)


def test_joining_alone_makes_and_ends_a_process_group() -> None:
    with joined_world(ProcessEnvironment(), timeout_s=30, device="cpu") as world:
        assert dist.is_initialized()
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        assert world.host
    assert not dist.is_initialized()


def test_the_process_group_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="inside"), joined_world(ProcessEnvironment(), timeout_s=30, device="cpu"):
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def _communicate(world: World) -> dict[str, Any]:
    def refuse() -> None:
        raise UserError("the store is down", may_pass=True)

    try:
        world.first(refuse)
        said = "nothing"
    except UserError as error:
        said = "again: " * isinstance(error, SaidByRankZero) + f"{error}, may pass: {error.may_pass}"
    return {
        "sum": world.all_reduce_sum_(torch.tensor([1.0, float(world.rank)])).tolist(),
        "broadcast": world.broadcast(f"from {world.rank}"),
        "gathered": world.gather(world.rank * 10),
        "first": world.first(lambda: world.rank + 100),
        "said": said,
    }


@pytest.mark.distributed
def test_three_ranks_agree(ranks: Any) -> None:
    results = ranks(3, _communicate)
    for rank, result in enumerate(results):
        assert result["sum"] == [3.0, 3.0]
        assert result["broadcast"] == "from 0"
        assert result["gathered"] == [0, 10, 20]
        assert result["first"] == 100
        assert result["said"] == "again: " * (rank > 0) + "the store is down, may pass: True"


def test_cuda_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with (
        pytest.raises(UserError, match=r"train\.device=cuda"),
        joined_world(ProcessEnvironment(), timeout_s=10, device="cuda"),
    ):
        pass


def test_srun_without_slurms_own_commands_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        ProcessEnvironment.read(SRUN | {"SLURM_PROCID": "0"})
    address = ProcessEnvironment.read(SRUN | {"SLURM_PROCID": "0", "MASTER_ADDR": "10.0.0.1"}).master_addr
    assert address == "10.0.0.1"


def test_a_wish_to_stop_on_rank_zero_stops_all() -> None:
    def asked() -> None:
        raise StopAsked(1)

    with pytest.raises(StopAsked) as stop:
        World().first(asked)
    assert stop.value.word == 1
