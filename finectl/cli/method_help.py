"""What the table of initialisation methods says of each, in words: for `ls methods` and `init --method NAME --help`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from finectl.initializers import ANCESTORS, METHODS, PAPER_TUNE_STEPS, SMALL_TUNE_STEPS, Method

ARGUMENTS = "finectl.arguments"
ALL = "all"


def needs(method: Method) -> str:
    """Return what a method starts from."""
    if method.anew:
        return "nothing"
    made = method.condensed if method.condensed != "fine" else "--from" if method.fitted else ""
    learngene = [f"learngene ({made})" if made else "learngene"] if "learngene" in method.sources else []
    dense = ["dense model"] if set(ANCESTORS) & set(method.sources) else []
    return " or ".join([*learngene, *dense])


def making(method: Method) -> str:
    """Return the command that makes what a method starts from."""
    if "learngene" not in method.sources:
        return "finectl init --method he --model dit-nano | finectl train -"
    option = " --from MODEL" if method.fitted else ""
    if method.condensed not in ("", "fine"):
        option = f" --method {method.condensed}"
    return f"finectl condense{option} | finectl extract -"


def width(method: Method) -> str:
    """Return which widths a method can make, beside its source's."""
    return method.width_range if method.widths else "same"


def updates(method: Method) -> str:
    """Return how many optimiser updates a model costs, for the variants that differ one by one."""
    costs = {variant: _updates_of(method, variant) for variant in method.variants or (None,)}
    if len(set(costs.values())) == 1:
        return next(iter(costs.values()))
    return ", ".join(f"{variant} {cost}" for variant, cost in costs.items())


UPDATES = "updates: --tune-steps; where there are two, on bundled / on other data"


def _updates_of(method: Method, variant: str | None) -> str:
    if not method.tunes(variant):
        return "0"
    if method.tune_share:
        return "a pre-training" if method.tune_share == 1 else f"{method.tune_share:.0%} of a pre-training"
    return f"{SMALL_TUNE_STEPS} / {PAPER_TUNE_STEPS}"


def variants(method: Method) -> str:
    """Return the variants, the usual one first."""
    return ", ".join(method.variants)


def constants(method: Method) -> str:
    """Return the numbers that `--set` changes, with their usual values."""
    return ", ".join(f"{name}={value:g}" for name, value in method.constants.items())


def explain(name: str) -> list[str]:
    """Return a method in three lines: what it does, what it needs and costs, and how it varies and where it is from.

    Raises:
        UsageError: there is no such method.
    """
    method = METHODS[name]
    kinds = [f"a learngene ({making(method)})"] if "learngene" in method.sources else []
    kinds += ["a dense model"] if set(ANCESTORS) & set(method.sources) else []
    needed = "nothing but shapes, INPUT's or --model's" if method.anew else " or ".join(kinds)
    widths = f"Width{' (--model)' if method.widths else ''}: {width(method)}"
    usual = [f"{method.variants[0]} (usual)", *method.variants[1:]] if method.variants else []
    choice = [f"Variants: {', '.join(usual)}."] if usual else []
    numbers = [f"Numbers (--set): {constants(method)}."] if method.constants else []
    tuned = " (--tune-steps, bundled / other data)" if "/" in updates(method) else ""
    return [
        f"{name}: {method.help}.",
        f"Needs {needed}. {widths}. Updates{tuned}: {updates(method)}.",
        " ".join([*choice, *numbers, f"Reference: {method.reference}."]),
    ]


class MethodCommand(TyperCommand):
    """A subcommand whose help explains the method that `--method` names, wherever it stands on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the command line for the help, which is shown before any other option is looked at."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring, or what the named methods are.

        Raises:
            UsageError: there is no such method.
        """
        given = self.make_parser(ctx).parse_args(list(ctx.meta.get(ARGUMENTS, ())))[0].get("method")
        if not given or given == ALL:
            super().format_help_text(ctx, formatter)
            return
        for name in str(given).split(","):
            formatter.write_paragraph()
            with formatter.indentation():
                for line in explain(name.strip()):
                    formatter.write_text(line)
