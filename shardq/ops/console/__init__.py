"""The console: one page for a team, served by `shardq console`. Reads unless it was started with a token for writes.

`feed` reads a queue once a second for all who look at it, `shown` makes JSON of what is read, `guard` refuses requests
that a page of ours did not make, `app` is the API, `server` runs it, `assets/` is the page itself: plain HTML, CSS and
JavaScript modules, without a build step and without requests to anybody else.
"""
