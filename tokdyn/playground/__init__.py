"""The playground behind `tokdyn playground`: pictures, token maps and costs while a model draws, in a browser.

`classes` and `prompts` draw and know nothing of a browser; `page` and `server` are the only files that need gradio.
"""
