"""Arguments of commands whose model may use tools that run here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from gptoss.cli.arguments import Option
from gptoss.cli.endings import usage

if TYPE_CHECKING:
    from gptoss.tools import Toolbox


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What is switched on; nothing by default."""

    tool: Annotated[
        list[str] | None,
        Option(
            help="python, python=INTERPRETER, browser=FOLDER or apply_patch=FOLDER: the model may "
            "use it; may be repeated"
        ),
    ] = None
    mcp: Annotated[
        list[str] | None,
        Option(help="NAME=COMMAND or NAME=URL: a server of tools; may be repeated"),
    ] = None

    def box(self) -> AbstractContextManager[Toolbox | None]:
        """They are started where it is entered: a slip must not wait for a model to be loaded."""
        if not self.tool and not self.mcp:
            return nullcontext()
        from gptoss.tools import Toolbox, kit, mcp_server

        with usage():
            kits = [kit(said) for said in self.tool or []]
            return Toolbox([*kits, *(mcp_server(said) for said in self.mcp or [])])
