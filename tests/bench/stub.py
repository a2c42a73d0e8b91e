"""A server that streams at a known pace: ``python stub.py [--delay 0.05] [--gap 0.01]``.

Prints its port. It answers by what the model is called, which is how a test orders its faults.
"""

import argparse
import asyncio
import json

MODELS = ["steady", "other"]
CROWD = 20  # whom "crowd" lets come together before it answers anybody
TOGETHER = asyncio.Barrier(CROWD)


def chunk(data):
    text = b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(text), text)


def reply(status, body):
    head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nContent-Type: application/json"
    return head.encode() + b"\r\n\r\n" + body


async def answer(reader, writer, delay, gap):
    head = await reader.readuntil(b"\r\n\r\n")
    headers = {k.lower(): v for k, _, v in (x.partition(": ") for x in head.decode().split("\r\n"))}
    method, path, _ = head.decode().split(" ", 2)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    if path == "/v1/models":
        listed = json.dumps({"data": [{"id": name} for name in MODELS]}).encode()
        writer.write(reply(200 if headers.get("authorization") else 401, listed))
    else:
        await stream(writer, path, json.loads(body), delay, gap)
    await writer.drain()
    writer.close()


async def stream(writer, path, asked, delay, gap):
    model, n, chat = asked["model"], asked["max_tokens"], path == "/v1/chat/completions"
    if model == "full" or not (chat or path == "/v1/completions"):
        return writer.write(reply(429 if model == "full" else 404, b"{}"))
    if model == "plain":
        return writer.write(reply(200, b"{}"))
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n")
    writer.write(b"Content-Type: text/event-stream\r\n\r\n")
    if model == "crowd":
        await TOGETHER.wait()
    clock = asyncio.get_running_loop().time
    start = clock()
    if chat:
        writer.write(chunk({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
    for i in range(n):
        await asyncio.sleep(start + delay + i * gap - clock())
        said = {"delta": {"reasoning" if i < 2 else "content": "x "}} if chat else {"text": "x "}
        writer.write(chunk({"choices": [said]}))
        await writer.drain()
        if (model, i) == ("cut", 1):
            return None
        if (model, i) == ("error", 1):
            return writer.write(chunk({"error": {"message": "out of memory"}}))
        if (model, i) == ("hang", 1):
            await asyncio.sleep(60)
    writer.write(chunk({"choices": [{"delta": {}, "text": "", "finish_reason": "stop"}]}))
    if model != "uncounted":
        words = asked["prompt"] if not chat else asked["messages"][0]["content"]
        usage = {"prompt_tokens": len(words.split()), "completion_tokens": n}
        writer.write(chunk({"choices": [], "usage": usage}))
    writer.write(chunk(b"[DONE]") + b"0\r\n\r\n")


async def main():
    options = argparse.ArgumentParser()
    options.add_argument("--delay", type=float, default=0.05)
    options.add_argument("--gap", type=float, default=0.01)
    given = options.parse_args()

    async def one(reader, writer):
        try:
            await answer(reader, writer, given.delay, given.gap)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
