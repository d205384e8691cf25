"""What a browser is asked about a page, in JavaScript."""

# What the page shows of the last answer, each time it changes
WATCH = """() => {
    window.shown = [];
    new MutationObserver(() => {
        const answers = document.querySelectorAll('#chatbot [data-testid=bot]');
        const text = answers.length ? answers[answers.length - 1].innerText.trim() : '';
        if (text && text !== window.shown.at(-1)) window.shown.push(text);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# The pixels of an image, one for each `enlarged` square of its own
PIXELS = """(image, side) => {
    const canvas = Object.assign(document.createElement('canvas'), {width: side, height: side});
    const context = canvas.getContext('2d');
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, side, side);
    return Array.from(context.getImageData(0, 0, side, side).data);
}"""
# Texts whose contrast with what lies behind them is below WCAG's AA (4.5, or 3 for large letters), with the contrast
FAINT = """() => {
    const parse = (colour) => {
        const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        probe.fillStyle = colour;
        probe.fillRect(0, 0, 1, 1);
        return [...probe.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
    };
    const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
    const behind = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
        return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1]);
    };
    const luminance = (colour) => colour
        .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    const PASSING = '.sr-only, .visually-hidden, [disabled], [data-testid=status-tracker]';
    const found = [];
    const judge = (element, text, style) => {
        const background = behind(element);
        const colour = parse(style.color);
        let opacity = 1;
        for (let at = element; at; at = at.parentElement) opacity *= getComputedStyle(at).opacity;
        const [low, high] = [luminance(over([...colour.slice(0, 3), colour[3] * opacity], background)),
            luminance(background)].sort((a, b) => a - b);
        const contrast = (high + 0.05) / (low + 0.05);
        const size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        if (contrast < (large ? 3 : 4.5)) found.push([text.trim().slice(0, 40), Number(contrast.toFixed(2))]);
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const seen = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
        const meant = walker.currentNode.data.trim() && !element.closest(PASSING);
        if (seen && meant) judge(element, walker.currentNode.data, getComputedStyle(element));
    }
    for (const field of document.querySelectorAll('textarea, input[type=number]'))
        if (field.checkVisibility()) {
            if (field.placeholder) judge(field, field.placeholder, getComputedStyle(field, '::placeholder'));
            judge(field, field.value || 'a value', getComputedStyle(field));
        }
    return found;
}"""
# Controls that reach beyond the sides of the window
OUTSIDE = """() => [...document.querySelectorAll('button, input, textarea, a, img, [role=tab], table')]
    .filter((element) => element.checkVisibility({visibilityProperty: true}) && !element.closest('.visually-hidden'))
    .map((element) => [element.ariaLabel || element.innerText || element.tagName, element.getBoundingClientRect()])
    .filter(([, box]) => box.width && (box.left < -0.5 || box.right > innerWidth + 0.5))
    .map(([name, box]) => [name, box.left, box.right])"""
# Some frames later: what the page had still to do is done
FRAMES = """async () => {
    for (let count = 0; count < 10; count++) await new Promise((drawn) => requestAnimationFrame(drawn));
}"""
