from configparser import ConfigParser
from setuptools import setup

config = ConfigParser()
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = ['dev', 'docs', 'fast', 'distributed', 'bench']

setup(
    description=cfg['description'],
    author=cfg['author'],
    keywords=cfg['keywords'].split(),
    license_expression=cfg['license'],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in extras},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': 'onecycle_prune = onecycle_prune._modidx:d',  # lets nbdev link to our docs
    },
)
