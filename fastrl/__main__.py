from fastrl.cli import app

app()
