"""The web pages: what a browser asks for. The pages themselves are TypeScript, in ui/, built into `static/`."""
