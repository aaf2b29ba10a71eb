"""Names the server makes up."""

from __future__ import annotations

import base64

from wbdist.core.mixing import mix64

ADJECTIVES = """
    amber ancient autumn azure balmy bold breezy bright brisk calm celestial clear cosmic crimson curious dainty daring
    deep distant dutiful eager earnest electric elated fallen fancy fearless floral fluent frosty gentle gilded glad
    glowing golden graceful grateful happy hardy hearty honest humble icy jolly jumping kind lasting lemon light likely
    lilac lively lucky lunar mellow mild misty modest morning neat noble northern olive pale peachy pleasant polar
    polished proud quiet radiant rare ready restful royal rustic scarlet serene shining silvery smooth snowy soft solar
    spring stellar still sunny super sweet swift thriving true upbeat valiant vivid warm wandering wild wise woven young
    zesty
""".split()  # noqa: SIM905  (a list of words reads as prose)
NOUNS = """
    aardvark armadillo aurora bee bird blaze breeze brook butterfly canyon cherry cloud comet cosmos crane creek darkness
    dawn deer dew donkey dragon dream dune eagle elevator ember energy etchings falcon feather fern field fire firefly
    flower fog forest fox frog frost galaxy gate glade glitter grass grove harbor haze hill jazz lake lantern leaf lion
    meadow microwave monkey moon morning mountain music night oath ocean owl paper pine planet plant pond pyramid rain
    resonance river sea serenity shadow shape silence sky smoke snow snowflake sound spaceship star sun sunset surf
    terrain thunder tree universe valley violet voice vortex water wave wildflower wind wood yogurt
""".split()  # noqa: SIM905  (a list of words reads as prose)


def invent(run_id: str, number: int) -> str:
    """`adjective-noun-N`, N being the run's number in its project; the words follow from the id, so a retry gives the same."""
    value = mix64(*run_id.encode())
    return f"{ADJECTIVES[value % len(ADJECTIVES)]}-{NOUNS[(value >> 20) % len(NOUNS)]}-{number}"


def storage_id(entity: str, project: str, run_id: str) -> str:
    """W&B's opaque id of a run: its names, so that it needs no table."""
    return base64.b64encode(f"Run:v1:{run_id}:{project}:{entity}".encode()).decode()


def incarnation(name: str) -> tuple[str, int | None]:
    """A run's id and the attempt that `<run>:<attempt>` names, None for the run as it is now.

    Run ids hold no colon; what follows one that is no number makes the whole an id that no run has.
    """
    run_id, colon, number = name.rpartition(":")
    return (run_id, int(number)) if colon and number.isdecimal() and len(number) < 10 else (name, None)
