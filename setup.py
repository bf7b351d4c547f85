from configparser import ConfigParser

from setuptools import setup

config = ConfigParser()
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

suffix = '_requirements'
extras = {key.removesuffix(suffix): value.split() for key, value in cfg.items() if key.endswith(suffix)}

setup(
    description=cfg['description'],
    author=cfg['author'],
    keywords=cfg['keywords'].split(),
    classifiers=cfg['classifiers'].strip().splitlines(),
    license_expression=cfg['license'],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': 'onecycle_prune = onecycle_prune._modidx:d',  # nbdev links names to our pages by it
    },
)
