"""Tools that the model was trained to use, run here: see ``box``."""

from gptoss.tools.box import Result, Rounds, Session, Toolbox, kit, mcp_server
from gptoss.tools.call import Kit, ToolError

__all__ = ["Kit", "Result", "Rounds", "Session", "ToolError", "Toolbox", "kit", "mcp_server"]
