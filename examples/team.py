"""A team of agents in SGLang's frontend language, on a server with the relay extension.

    python examples/team.py                              # starts a server on a small model
    python examples/team.py --url http://127.0.0.1:30000 # uses a running one

An architect plans; two developers continue in forks of that conversation, so they share its prefix; a reviewer, under
another role prompt, reads all three texts, which no prefix cache can help with. The program says nothing about relay:
the server decides, and reports in ``meta_info``.
"""

# The frontend takes plain strings wherever its annotations say SglExpr.
# pyright: reportArgumentType=false

import argparse
from typing import Any

import sglang as sgl
from serving import add_server_arguments, fail, say, server
from sglang.lang.interpreter import ProgramState, ProgramStateGroup

ARCHITECT = "You are a software architect. You plan small programs in plain words, one step after the other."
REVIEWER = "You are a strict reviewer. You read a plan and two reports, and you say what does not fit together."
TASK = "A library lends out bicycles. Plan a program that keeps track of bicycles, readers and loans."
PARTS = (
    "You are the first developer. Describe how you build the storage of bicycles and readers.",
    "You are the second developer. Describe how you build lending, returning and reminders.",
)


def write(name: str, tokens: int) -> Any:
    """Exactly ``tokens`` tokens, greedily; a model this small repeats itself without the penalty."""
    return sgl.gen(name, max_tokens=tokens, min_tokens=tokens, temperature=0, frequency_penalty=0.4)


@sgl.function
def develop(s: ProgramState, task: str, tokens: int) -> ProgramStateGroup:
    """The architect, then the developers in forks; gathers ``plan`` and the list ``work``."""
    s += sgl.system(ARCHITECT)
    s += sgl.user(task)
    s += sgl.assistant(write("plan", tokens))
    developers = s.fork(len(PARTS))
    developers += [sgl.user(part) for part in PARTS]
    developers += [sgl.assistant(write("work", tokens)) for _ in PARTS]
    developers.join()
    return developers


@sgl.function
def review(s: ProgramState, task: str, plan: str, work: list[str], tokens: int) -> None:
    """The reviewer reads everything; each text stands on lines of its own, where it is tokenized as it was decoded."""
    parts = [f"The task:\n{task}", f"The architect wrote:\n{plan}"]
    parts += [f"Developer {number} wrote:\n{text}" for number, text in enumerate(work, 1)]
    s += sgl.system(REVIEWER)
    s += sgl.user("\n\n".join([*parts, "What does not fit together?"]))
    s += sgl.assistant(write("review", tokens))


def finished(state: ProgramState, name: str) -> dict[str, Any]:
    """The report of one generated text, after its program ended without an error."""
    if state.error() is not None:
        fail(f"the server did not serve {name!r}: {state.error()}")
    meta = state.get_meta_info(name)
    if meta is None or "relay" not in meta:
        fail("this server does not run the relay extension: start it with --radix-cache-backend relay")
    return meta


def print_table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """How each agent's prompt was served, in tokens."""
    print(f"\n{'agent':<12}{'prompt':>8}{'prefix':>8}{'relayed':>9}{'recomputed':>12}{'fresh':>7}{'segments':>10}")
    for agent, meta in rows:
        relay = meta["relay"]
        counts = f"{meta['prompt_tokens']:>8}{relay['exact']:>8}{relay['relayed']:>9}{relay['recomputed']:>12}"
        declined = f"  declined: {relay['declined']}" if relay["declined"] else ""
        print(f"{agent:<12}{counts}{relay['fresh']:>7}{relay['segments']:>10}{declined}")
    print("\nTokens of each prompt: shared by prefix; relayed as they were decoded; reused and repaired; prefilled.")


def main() -> None:
    """Run the team and print what it wrote and what it shared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens that each agent writes (%(default)s)")
    parser.add_argument("--chat-template", default="chatml", help="the frontend's template (%(default)s)")
    args = parser.parse_args()
    if args.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")

    with server(args) as url:
        backend = sgl.RuntimeEndpoint(url, chat_template_name=args.chat_template)
        say("the architect plans, two developers work in forks of the plan ...")
        team = develop.run(TASK, args.max_tokens, backend=backend)
        rows = [("architect", finished(team, "plan"))]
        developers: ProgramStateGroup = team.ret_value  # pyright: ignore[reportAttributeAccessIssue]
        rows += [(f"developer {i}", finished(state, "work")) for i, state in enumerate(developers.states, 1)]
        say("the reviewer reads all three texts ...")
        verdict = review.run(TASK, team["plan"], team["work"], args.max_tokens, backend=backend)
        rows.append(("reviewer", finished(verdict, "review")))
    texts = [team["plan"], *team["work"], verdict["review"]]
    for (agent, _), text in zip(rows, texts, strict=True):
        print(f"\n--- {agent}\n{text}")
    print_table(rows)


if __name__ == "__main__":
    main()
