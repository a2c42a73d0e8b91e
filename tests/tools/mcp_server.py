"""An MCP server over stdio, whose tools work, fail, die or hang."""

import os
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("things")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("no luck today")


@server.tool()
def die() -> str:
    """Take the server down."""
    os._exit(3)


@server.tool()
def hang() -> str:
    """Never answer."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    server.run("stdio")
