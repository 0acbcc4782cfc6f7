"""Programs as subprocesses: what is left of one that ends before it has read its input."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from common.process import end, run


@pytest.mark.parametrize("program", [("sleep", "100"), ("true",)])
async def test_a_program_that_does_not_read_on_is_no_fault_of_ours(program: tuple[str, ...]) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*program, stdin=pipe, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(b"x" * 2_000_000)
    await end(process)
    assert process.returncode is not None
    del process
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_input_goes_in_and_output_comes_out() -> None:
    assert (await run(["cat"], timeout=10, input=b"abc")).output == "abc"
