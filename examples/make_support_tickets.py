"""Writes `support_tickets.csv`: invented tickets of a small shop that sells gadgets and a subscription."""

# The label is what the writer *wants*, not what the story is about; a late parcel may end in a refund or in praise.
# Wanted: money back (refund_request), a bill put right or paid (billing), the goods at last (delivery_delay), a
# way in (account_access), the end of an order or contract (cancellation), a fault mended (technical_issue), to know
# something about the goods (product_question), only to be heard (feedback).
#
# Texts are put together from fragments: `[a|b]` is a choice, `{prod}` a slot that keeps its value within one text,
# ` / ` parts two fragments. Some are whole sentences written by hand. The file has dirt on purpose: a byte-order mark,
# line breaks in cells, duplicates, conflicts, empty cells, white space around labels, about one label in forty wrong.
#
# Run it as `python examples/make_support_tickets.py`: the same bytes every time.

import csv
import random
import re
from pathlib import Path

SEED = 20
SIZES = {
    "delivery_delay": 600, "billing": 520, "refund_request": 480, "account_access": 410, "technical_issue": 340,
    "cancellation": 300, "product_question": 220, "feedback": 180,
}  # fmt: skip
WRONG_LABELS, BROKEN_LINES, TWINS, CONFLICTS, EMPTY_TEXTS, EMPTY_LABELS, PADDED_LABELS = 66, 30, 25, 4, 3, 2, 12

SLOTS = {
    "prod": """desk lamp / label printer / plant sensor / kettle / scanner / headset / e-ink frame / keyboard / kitchen
scale / webcam / doorbell / speaker / air monitor / charging dock / smart plug / heated blanket / night light / bike
lamp""",
    "plan": """pro plan / family plan / yearly plan / team plan / basic plan / student plan / premium plan /
subscription / membership""",
    "app": "app / desktop app / web editor / tablet app / new version / dashboard / phone app",
    "amt": "9.90 / 19.99 / 24 euros / 49 / 12.50 / 59.95 / 120 euros / 7.99 / 34.90 / 89 euros / 15 euros",
    "num": "#4821 / 7731 / #5097 / no. 2041 / #6110 / 3380 / #4487 / no. 3155 / #5903 / 8812 / #1276",
    "date": "monday / 3 march / 14/05 / the 21st / easter / early june / the weekend / 30.09. / friday",
    "month": "january / march / may / august / october / november / july",
    "days": "three days / nine days / a week / two weeks / a month / 12 days / ages / five working days / ten days",
    "err": """E-204 / 403 / 0x17 / "unknown state" / 500 / TIMEOUT_9 / "try later" / 1006""",
    "gear": """an older tablet / linux / a 5 ghz network / my old dock / an old laptop / two phones / a screen reader /
110 volts / a hearing aid""",
}

STORY = {  # what happened
    "delivery_delay": """[my|the|our] [parcel|box|package|order|delivery] is {days} late / ordered the {prod} on {date},
[nothing came|still not here|no sign of it] / tracking [has not moved|is stuck|shows the same depot] since {date} / the
courier [says|claims] delivered but [my porch is empty|nobody rang|there's no parcel] / the replacement {prod} never
[came|arrived|showed up] / the [present|{prod}] did not arrive in time for [my son's birthday|the party|moving day] /
the parcel [sits|has been] in customs since {date} / the driver left my package [at the wrong house|who knows where] /
order {num} [says "preparing"|hasn't shipped] for {days} / the box went to my old [flat|address]""",
    "billing": """you [took|debited|charged] {amt} [twice|two times] / the payment failed but {amt} is gone / there's
{amt} on my statement [from you|and i don't know why] / i got a [payment reminder|dunning letter] for an invoice i
[paid|settled] on {date} / my [voucher|discount code] [was ignored|did nothing] at checkout / my card was
[charged|debited] during the free trial / my [credit card|bank account] [changed|was replaced|expires in {month}] /
shipping was [billed|charged] per item / paid by transfer on {date} and order {num} still shows unpaid / the invoice for
{month} has the wrong [name|amount|vat] / my card got declined [at renewal|three times]""",
    "account_access": """[locked out|can't get in|can't log in|can't sign in] since {date} / the
[password|reset|verification] mail [never comes|arrives too late|isn't in spam either] / my account [shows as|is]
[suspended|blocked|disabled] / got a new phone and lost [my codes|the authenticator] / i no longer have the email i
[signed up with|registered] / it says [wrong password|user unknown] [every time|again and again] / our admin left and
nobody has the password / someone [else|strange] is [using|logged into] my account / the login page [only|just] spins /
it asks for a login code i [don't have|never set up]""",
    "technical_issue": """the {app} [crashes|freezes|closes|hangs] when i [open it|print|hit save] / since the update
only a [white|blank|black] screen / error {err} [at checkout|on every save|when i log in] / sync [stopped working|has
been dead since {date}] / the export [file is empty|has garbled letters] / the {prod} [won't pair|drops the wifi|reboots
by itself|doesn't connect] / the pay button [does nothing|is grey] / the {app} [ate|lost|deleted] my [notes|files] / the
{app} is [so|very|terribly] slow [lately|since {month}] / the tracking page [throws|shows] error {err}""",
    "cancellation": """the {plan} renewed [without asking|by itself|on {date}] / i [barely|hardly|never] use the {plan}
[now|any more] / my trial ends [on|around] {date} / we're only two people left on the {plan} / the {plan} was for a
project that's [over|finished] / i lost my job and must save, the {plan} too / i [picked|clicked] the {plan} by
[mistake|accident] / order {num} was a mistake / i don't need the {plan} [after all|any longer] / moving abroad in
{month}, the {plan} is no use there""",
    "refund_request": """the {prod} [came|arrived] [broken|cracked|scratched], i returned it / i got the wrong
[colour|size|model] and sent it back / the {prod} is [smaller|louder|dimmer] than in the photos and i don't want it /
the {prod} [died|stopped working] after {days} / i returned [order {num}|the {prod}] {days} ago / you sold me a used
{prod} / you cancelled order {num} and kept my {amt} / i paid {amt} for a second {prod} as bad as the first / your
return desk has had my {prod} since {date}""",
    "product_question": """i'm [thinking about|looking at] [buying|getting] the {prod} / saw the {plan} on your page,
[not sure|curious] / i have the older {prod} and look at the new one / [comparing|hesitating between] two of your models
/ the {prod} would be a [present|gift] for my [dad|neighbour] / we're a [school|choir|dentist's office] interested in
the {plan} / before i order the {prod} / on the basic plan now, thinking of a bigger one / the {prod} is on my list for
{month}""",
    "feedback": """i've been your customer for [four|six|ten] years / your [support lady|chat person|hotline guy] was
[lovely|very rude|clueless|great] / the new layout [confuses me|is a mess|is pretty|looks cheap] / i [love|adore|quite
like] the {prod} / [forty|ten] minutes of hold music [on {date}|] / so much [plastic|cardboard|foam] for one {prod} /
your chat robot [goes round in circles|is useless|made me laugh] / the driver was [so friendly|unfriendly] / the
[packaging|manual] of the {prod} is [beautiful|a disgrace]""",
}

NEAR = {  # labels whose story may lead to this wish, or whose wish is turned down
    "billing": "refund_request cancellation delivery_delay account_access",
    "refund_request": "delivery_delay billing cancellation technical_issue",
    "delivery_delay": "refund_request billing cancellation technical_issue",
    "account_access": "billing technical_issue cancellation",
    "cancellation": "billing delivery_delay technical_issue refund_request account_access",
    "technical_issue": "account_access billing refund_request product_question",
    "product_question": "cancellation technical_issue refund_request delivery_delay",
    "feedback": "delivery_delay technical_issue billing refund_request account_access",
}

DO = {  # wishes in words that go after "please" as well as after "please don't"
    "billing": """explain the [charge|{amt} charge|fee|second debit] [on my statement|] / correct the [invoice|amount on
the bill|total|vat line|name on the invoice] / put our [vat number|company name|new address] on the [invoice|bill] /
[update|change|swap] the [card|bank account|payment method] [on file|for the {plan}] / [switch|move] [me|us] to
[yearly|monthly|quarterly] [billing|payments] / check why [i was|my card got] [charged {amt}|debited twice|charged more
than agreed] / tell me what the {amt} [charge|debit|on my statement] is for / apply the [discount|voucher|student price]
to the bill / [move|shift] the [debit|due date|payment] to the first / see if my [payment|transfer] [arrived|was booked]
/ stop the payment reminders / [bill|charge] the [right|agreed|advertised] price [from now on|] / take the [late
fee|surcharge] off the [bill|invoice] / let [me|us] pay by [invoice|bank transfer|debit]""",
    "refund_request": """refund [me|us|order {num}|the {prod}|the {plan}] / [send|give|wire|transfer] [me|us] [my|the]
[money|{amt}|cash] back / refund the [double|second|wrong] [payment|charge] / pay [me|us] back [in full|the whole
price|] / [return|credit] the {amt} to my [card|bank account] / put the [money|{amt}] back [on|onto] my [card|account] /
let me return the {prod} for [the money|a refund] / take the {prod} back and [return what i paid|give me my money] /
[approve|accept] [the|my] return / [send|mail] [me|] a return label / [refund|pay back] the [unused|last] [month|year] /
give me back what the [{prod}|{plan}] cost / compensate me for the {amt} i lost""",
    "delivery_delay": """[tell me|find out|say] where [the {prod}|my parcel|order {num}|our package] is / chase the
[courier|carrier|driver] about my parcel / [send|ship|dispatch] [the {prod}|the missing half|order {num}] [today|at
last|] / [give|send] me a [working|] tracking [number|link] / get the {prod} [delivered|to my door] [before {date}|this
week|by the weekend] / [open|start] a parcel [trace|search] [with the courier|] / tell me [when|what day] [the
{prod}|the parcel|order {num}] [comes|arrives|leaves your warehouse] / [give|name] me [a|an honest] delivery
[date|day|time] / get my order [moving|shipped|through customs] / [post|ship] the replacement {prod} [by express|] /
have the parcel brought to [my office|the neighbour|the new address] / look up why [tracking|the parcel] [is stuck|says
delivered] / deliver [what i ordered|the {prod}|the parcel]""",
    "account_access": """[reset|clear] my [password|pin|login] / [unlock|unblock|reactivate] my
[account|profile|login] / let me [back in|in again|sign in|log in] / send [me|] [a|another] [password reset link|login
code|verification mail] / change the [email|phone number] [i log in with|on my login] / [turn off|remove|reset] the
[two factor login|authenticator|login code] / merge my two [accounts|logins] / move my [account|profile|login] to [my
new|another] email / give my [colleague|wife|bookkeeper] [admin rights|a login] / take [a former employee|my ex|the
old admin] off [our|the] account / look up which [email|user name] [i signed up with|my account has] / log out whoever
is [using|in] my account / make me the [owner|admin] of [our|the] [workspace|team] / [link|attach] [order {num}|the
{plan}] to my login""",
    "cancellation": """cancel [my|the] [subscription|{plan}|order|membership|contract] / [end|stop|terminate]
[the|my] [{plan}|subscription|trial|contract] [on {date}|now|] / [call off|cancel] order {num} / [turn|switch] off
[the|] [auto renewal|automatic renewal] / [delete|close] my account [for good|and all data|completely] / take me off
the {plan} / downgrade [me|us] to the free [tier|plan] / let the {plan} [run out|expire|lapse] / confirm [in
writing|] that [my contract|the {plan}] is [over|cancelled] / let me [out of the contract|leave the {plan}] /
[accept|process] my [notice|termination|cancellation] / [stop|discontinue] the monthly box / [close|shut down] our
[team plan|workspace]""",
    "technical_issue": """fix the [crash|bug|error|sync|export|checkout page|login page] / get the [{app}|sync|export]
[working|running] [again|] / have [a developer|an engineer|your tech people] look at the [log|crash|bug] /
[help|walk|talk] me through the [install|setup|pairing|update] / show me how to [stop|get around] the [freeze|blank
screen|error] / send [me|] [a patch|new firmware|the old version|an installer that works] / [look into|investigate]
[error {err}|why it freezes|the white page|the crashes] / make the {app} [open|load|print|work] [again|] / roll back the
[last|app] update / get the {prod} to [pair|connect|stay online|turn on] / find out why [the {prod}|the app] [won't
connect|reboots|goes dark] / sort out the [bluetooth|driver|printing] problem""",
    "product_question": """tell me [if|whether] the {prod} [works|runs] with {gear} / tell me what [comes with|is
included in] the [{plan}|box of the {prod}] / explain [the difference between|how to choose between] the two plans /
recommend [a|the right] [plan|size|model] for [us|a beginner|a big room] / let me know if the {prod} is [in stock|sold
in white] / tell me whether the {prod} [can|is able to] [hang on a wall|run outdoors|cover two rooms] / compare the
{prod} with the [older|bigger] one / advise me on which [plan|model] to [take|buy] / point me to [the manual of the
{prod}|a page about the {plan}] / tell me how many [people|devices] the {plan} [allows|covers] / show me a
[picture|demo] of the {prod} / tell me if you sell [spare parts|refills|a bag] for the {prod}""",
    "feedback": """[pass|hand] my [praise|comments|opinion] on to [the team|whoever designed it|your boss] /
[take|see|read] this as [a suggestion|a compliment|criticism] / think about [a dark mode|less packaging|bigger
letters|nicer boxes] / thank the [driver|lady|team] for [their kindness|being so patient] / put [a night mode|paper
tape|sunday delivery] on your wish list / keep up [the good work|your kind service|your standards] / tell the designers
[it looks great|it was nicer before] / let the team know [how i felt|they did well|it annoyed me] / train your
[drivers|chat people] [to be friendlier|better] / count me as [a happy|an unhappy] customer / read my [review|five
stars|two stars]""",
}

ASK = {  # wishes in other words
    "billing": """what is this [{amt} charge|charge|debit] [for|about]? / why [two|different] [amounts|debits] on my
statement? / the [total|vat] on the invoice [can't be|isn't] right / where [do i find|is] the [invoice|receipt]? / our
bookkeeper needs the invoice for {month} / where do i enter my new [card|iban]? / did my payment reach you? / can we pay
the bill [quarterly|later|per seat]? / from next time please charge the other card""",
    "refund_request": """i want my money [back|] / where is my [refund|money]? / how do i [return it|send it back] for a
refund? / i expect {amt} back [on my card|] / am i [owed|entitled to] a refund? / i'd like to be [paid back|refunded] /
you get the {prod}, i get my cash / can [i send the {prod}|the {prod} go] back? / how long does the refund take?""",
    "delivery_delay": """where is my [order|parcel|{prod}]? / when [does my parcel|will order {num}|will the {prod}]
[come|arrive|get here]? / how much longer must i wait for the parcel? / is my package lost? / i [still|just] want [my
{prod}|what i ordered] delivered / has order {num} even [shipped|left]? / any news [of|on] my [delivery|parcel]? / will
it be delivered by {date}? / who has my package?""",
    "account_access": """how do i get [back in|in again|into my account]? / i [just|only] want to [log in|sign in]
[again|] / which email did i register with? / i need a new [login code|password] / my [boss|colleague] needs access to
the account too / was my account hacked? / why am i [blocked|locked out]? / what is my user name?""",
    "cancellation": """i [want to cancel|quit|am leaving] / how do i [cancel|leave|unsubscribe]? / [i'm done|we're done]
with the {plan} / i no longer want the {plan} / this is my notice to end the contract / don't renew [the {plan}|my
contract] / no more [monthly boxes|renewals] / i changed my mind about order {num}, don't ship it / this is my last
month on the {plan}""",
    "technical_issue": """how do i [fix|stop|get around] this error? / the {app} [won't|does not] [work|start|load] /
what does error {err} mean? / is your server down? / i tried reinstalling, [no luck|same thing] / how do i get the old
version back? / nothing happens when i click / i need it running by {date} / is there a [patch|workaround]?""",
    "product_question": """does the {prod} work with {gear}? / what's included in the {plan}? / how long does the
battery of the {prod} last? / is the {prod} [waterproof|safe for kids|loud]? / which [plan|model] is [better|right] for
[two people|a flat]? / does the {prod} come in [white|a bigger size]? / is there [a version for schools|a longer cable]?
/ how many devices can use the {plan}? / what is the {prod} made of?""",
    "feedback": """[just|only] [saying|so you know] / no answer needed / wanted [to tell you|you to hear it] /
[nice|great|good] work [on that|] / two stars from me / it could be so much better / keep it up / a dark mode would be
lovely / made my day / five stars""",
}

DENY = {  # what it is not about
    "billing": """the [bill|invoice] is [right|fine] / i don't mind the price / the charge is ok / payment went through
fine / i have the receipt""",
    "refund_request": """it's not about the money / i don't want [my money|a refund|the {amt}] back / keep the money /
i'm keeping the {prod} / no refund needed""",
    "delivery_delay": """the parcel came [on time|quickly] / i don't care when it comes / i know where the box is /
shipping was fast / i can wait for the {prod}""",
    "account_access": """i can log in [fine|] / my password works / i'm not locked out / i have access / i don't need a
new password""",
    "cancellation": """i don't want to [cancel|leave] / i'm [staying|not leaving] / i keep the {plan} / my contract may
go on / don't close my account""",
    "technical_issue": """the {app} [works|runs fine] / nothing is broken / it's not a bug / the error is gone / i fixed
the crash myself""",
    "product_question": """i know what the {plan} includes / i read the specs / no questions about the {prod} / i know
how it works / i don't need advice""",
}

VAGUE = """can you help? / what now? / please sort this out / help please / please check / can someone look at this? /
this can't be right / what can i do? / any idea? / that's not ok / what should i do now? / who takes care of this?"""
PLEASE = """please DO / can you DO? / could you [please |]DO? / i want you to DO / i need you to DO / DO please / DO /
kindly DO / all i [want|ask] is that you DO / you [must|have to] DO / [just|simply] DO / pls DO / would you DO? / i'd be
glad if you could DO / [any chance|is it possible] you DO? / [time to|why not] DO / DO, [thanks|bitte|por favor] /
somebody [should|must] DO / when will you DO? / i asked you to DO, [still waiting|no reply]"""
CONTRAST = """[please |]don't NOT, [just|only|rather] DO / no need to NOT, [please |]DO / DO, but [please |]don't NOT /
DO. you don't have to NOT / i'd rather you DO than NOT / i'm not asking you to NOT, i'm asking you to DO / [your
colleague|the chat] offered to NOT, i'd prefer that you DO / the bot wanted to NOT. [no.|wrong.] DO / rather than NOT,
could you DO? / i [wrote|asked you] to NOT, [scratch that|forget it]: DO / instead i'd like you to DO, not to NOT / at
first i wanted you to NOT, now please DO / you were quick to NOT, thanks. now DO / too late to NOT, so DO / don't bother
to NOT, DO / why offer to NOT when i [want|need] you to DO? / thanks for offering to NOT, but i only want you to DO /
someone told me to have you NOT. not what i want. DO / DO (no, i don't want you to NOT) / stop trying to NOT and DO /
nobody has to NOT as long as you DO / i could ask you to NOT, but all i want is: DO / DO, then there is no reason to NOT
/ [must|will] you NOT? no. DO"""
OPEN = """hi / hello / hey / hi there / hello team / dear support / good morning / hallo / guten tag / hola / sir or
madam / hi again / good evening / hello everyone / listen / ok so / quick one / well / excuse me / buenos dias /
servus"""
CLOSE = """thanks / thank you / thx / thanks a lot / cheers / danke / gracias / regards / best wishes / viele grüße /
saludos / unbelievable / not amused / waiting for your answer / asap / many thanks in advance / have a nice day / this
is urgent / order {num} / ref {num} / sorry for my english / third time i write / 🙏 / 😡 / 🙂 / greetings from a tired
customer"""
SELF_EVIDENT = ("delivery_delay", "billing", "account_access", "technical_issue")
FOREIGN = 0.17  # how often the story belongs to another label than the wish
PLANS = {"SW": 30, "WS": 15, "SV": 12, "W": 15, "WW": 4, "C": 12, "SC": 3, "CS": 1, "SDW": 1, "DW": 4, "WD": 2}
LINKS = {
    "SW": [". ", ", ", " - ", ", so ", "... ", ". now "],
    "WS": [", ", ". ", " because ", ". reason: ", " - "],
    "": [". ", ", ", " - ", "... "],
}

WHOLE = {  # written as they stand
    "billing": """Two debits of {amt} on the same day, one of them with a text I can't read. Which is the real one? /
Order came, all good, except that the bill talks about three {prod}s and I have one. / My tax adviser sent the paper
back because our street is misspelt on it. / Is VAT already inside the {amt} or does it come on top? / We never got
anything on paper for {month}, and the auditors come on {date}. / You thank me for my payment in one mail and threaten
me in the next. / why does it say 12 x {amt} when i took the yearly one / The lad who quit is still counted. Four seats,
not five, on the next statement. / It isn't a refund I'm after, I'd like to understand how you get from 49 to 61.20. /
Transferred on {date} with the wrong reference, can someone put it where it belongs? / student code typed in, accepted,
green tick, and then full price on the card anyway / Could the amount be drawn after payday instead? The first would
suit me. / Got a 'final notice' this morning. For a thing that was paid in cash to your driver. / Exchange fee of 3.10??
your shop showed euros / The late parcel I forgive, the express surcharge on my bill I don't. / my husbands account pays
for mine now, how to set this / Was I logged out because the card failed? Then let me know how to pay it another way. /
{amt}. What for. / Same number on two invoices, our system refuses the second. / You have our old company form on
everything, it's a GmbH since {date}.""",
    "refund_request": """It went back to you on {date}, the slip says received, my account says nothing. / I would keep
the {prod} if it did what the page promised. It doesn't, so where do I drop it and when am I paid? / hab mich verklickt,
sorry, wrong thing bought, can it go back / Charged twice, and explaining it to me for the third time won't fill my
account again. / A gift card is no substitute. I paid with real euros and real euros is what I expect. / The trial was
over one day before I noticed. Could you be kind about the {amt}? / nobody could log me in for a month so that month
should not cost me anything / Returned two of three, got the price of one. One to go. / The cable alone broke, but your
policy seems to be that the whole set travels home and I get the sum. Fine. / Cancelled already, that's done. What's
left is the {amt} for the year I won't use. / Is thirty days from order or from delivery? Mine came on {date} and I'd
like to be rid of it. / My mother was talked into the {plan} by phone. She is 84. Kindly give her the {amt}. / The app
never ran on my phone. Don't repair anything, I'm over it, I only miss my {amt}. / half the price or all of it, you
choose, but not nothing / my bank says it can pull the payment, I would prefer you do it yourselves / Broken on arrival,
second time. No third one please. My card is the same as before. / i send it, you pay, ok? need the paper for the post /
The shirt size is my fault, I'll cover postage, when would I see the rest? / Price fell by 20 a day after. Do you pay
the difference? / Your courier lost it, your colleague admitted it, so who transfers what I spent?""",
    "delivery_delay": """No refund, no voucher, no apology: I would like to hold the thing in my hands. / The neighbours
say a van stopped, rang nowhere and left. Will it stop again? / Paid on {date}. Money gone at once. The {prod}, less
quick. / My password works, my card works, your shop works. What doesn't is the man with the parcel. / It's for a
wedding on Saturday, tell me honestly if I should buy another / Tracking: Leipzig, Leipzig, Leipzig, Leipzig. / Half of
it is here. The half with the screws isn't. / Replacement promised by phone, {days} ago. The broken one I'd have sent
back long since. / does 'handed over' mean to the post or to my dog / You confirmed, you thanked me, you debited, then
silence / We leave on holiday on {date}, could it wait at the post office if it's not here by then? / the app says
arrived. my door says no. / please i wait very long time for packet, when is coming? / Has anyone in your storehouse
actually seen order {num}? / I don't wish to cancel, I have waited too long to give up now. Any idea of the day? /
Customs wants a paper from you, since {date}, and won't move before they get it. / three mails 'on its way', zero things
on my table / My daughter asks every afternoon. What do I say to her? / is friday realistic yes or no / The address was
right on the bill and wrong on the label, can it be turned round?""",
    "account_access": """It wants six digits from a phone that lies at the bottom of a lake. / Paid, receipt here, and
still the page treats me like a stranger. / My maiden name is in the mail address, the mail address is gone, and so am
I, as it seems. / I'm not closing anything! I want to open it. / Our treasurer died and nobody else has the keys to the
club's workspace. / the link in the mail is good for ten minutes and the mail needs twenty / Someone in another country
bought a {prod} as me. Throw him out please. / 'Unknown user'. I've been known for six years. / how can i see my
invoices if i can't see anything / My card bounced, my card is fine again, my profile is still grey. / Wrong password,
wrong password, right password, too many attempts. / the new girl starts {date} and should see the orders, not the bills
/ Which of my four addresses did I use with you? / I was told to reinstall. It runs nicely now, up to the point where it
asks who I am. / captcha captcha captcha and then nothing lets me through / Please send the six numbers to my landline,
I have no mobile. / ex-partner still reads along in our family plan, i do not want that / My screen reader can't read
the picture that proves I'm human. / After the merger every address ends differently. Can ours be switched over? / Bin
seit {date} ausgesperrt, nothing comes to my inbox, also not in spam.""",
    "cancellation": """It was good while it lasted. From {month} on, without me please. / We shut the shop in {month}.
How do we wind this up with you? / Third wrong bill. I don't want it corrected, I want it to be the last. / how many
clicks does it take to get rid of you / Before it is packed: I took the wrong model, leave it on the shelf. / My father
passed away and his {plan} should not go on. / the free one is enough for me after all / If it's not here by {date} you
needn't send it at all. / I pressed the button, it thanked me, and I'm still a member. / All my data, gone, please, and
a line that confirms it. / Too slow, too dear, too many crashes. It's over between us. / not renewing. tell me you got
this. / I can't log in to quit, so I quit by mail. / Moving to a place with no internet, the {plan} makes no sense there
/ The order from {date}: two by mistake, one is plenty, hold the second. / quiero dar de baja, the {plan}, no more
please / Is a letter needed to end it, or is this mail enough? / Ich kündige. I was told English is quicker. / No, a
cheaper rate won't change my mind, colleague. Done means done. / pause isn't offered so then stop""",
    "technical_issue": """I press save. It smiles. Nothing is saved. / Invoices open as a page of question marks, on
both my computers. / I'm logged in all right, but then it shows me an empty room. / The little light on the {prod}
blinks red, red, green, and then it sulks. / Umlauts become soup in the export: grÃ¼n. / Everyone here has it since the
night from Tuesday. / A refund wouldn't help, I have deadlines and a blank screen. / the code arrives, i type it, the
page reloads, forever / battery went from two days to two hours with 4.1.2 / Does the thing write a log? I could mail it
to somebody who reads such things. / My map for the parcel is a grey square on the laptop, on the phone it's fine. /
scrolls by itself like haunted / your api answers 200 with an error inside, is this on purpose? / Printer prints, but
mirror-inverted. / Turned it off and on, held the button for ten seconds, said a prayer. / calendar one hour ahead since
the clocks changed / I dictate, it types a word behind. Phone is new. / The unsubscribe page gives {err}, not that I
want to leave, I stumbled on it. / when two of us edit, one of us loses / Lost sound after the last round of
improvements, left ear only""",
    "product_question": """If I go for the smaller one now, could I move up next year? / Before I send mine back as
broken: is it meant to hum? / Is the lid dishwasher-proof? / My {plan} covers two, what becomes of the third child? /
I'm not buying yet. Does it speak Portuguese? / Where is it made, and of what? / Do I need the hub as well or is the
{prod} clever enough alone? / can the dog chew on it, serious question / What's the difference, apart from forty euros?
/ Would it survive a winter on a balcony? / How loud is loud? You write 'quiet'. / Is the login needed at all or does it
run without an account? / Our hall has walls of a metre. Will the signal get through? / is the new one out before
christmas / Can you get ink for it in ten years? / Which one did you use in the video? / Do invoices come with the cheap
plan, or only with the big one? / plug type for switzerland? / How fast do you usually ship to the Azores, if I were to
order? / Is it ok for people with a pacemaker""",
    "feedback": """Money's back, thanks, but it shouldn't take four mails. / I cancelled last year and came back, that
says it all. / Whoever writes your error messages has humour. / Why must everything be grey now? The old one had charm.
/ My login took an hour of my life. It works now. Do better. / The bill is readable at last, somebody did think about
it. / no question, no problem, just wow / your driver carried it up five floors, give him a raise / I'd pay more for
less wrapping. / Your surveys are longer than my thesis. / Five days for a yes or no. I have my answer, and my opinion.
/ Half of my class bought the {prod} because of me, you're welcome / the hold music, please, anything but that / I fixed
the crash by myself, you might put the trick in your help pages. / It's a pity: good people on the phone, bad rules
behind them. / Refund came in a day. Respect. / Ein Lob muss auch mal sein. / To be frank the other shop explains its
plans better. / the {prod} outlived two phones, four stars as the manual is tiny / If you ever ask yourselves why people
leave: because of that menu.""",
}

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def parts(material: str) -> list[str]:
    return " ".join(material.split()).split(" / ")


class Writer:
    """Draws fragments from shuffled decks, so that each is used about equally often."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.decks: dict[str, list[str]] = {}

    def draw(self, material: str) -> str:
        deck = self.decks.setdefault(material, [])
        if not deck:
            deck += self.rng.sample(parts(material), len(parts(material)))
        return deck.pop()

    def fill(self, text: str) -> str:
        slots = {name: self.rng.choice(parts(material)) for name, material in SLOTS.items()}
        while "[" in text:
            text = re.sub(r"\[([^\[\]]*)\]", lambda m: self.rng.choice(m[1].split("|")), text)
        return re.sub(r"\{(\w+)\}", lambda m: slots[m[1]], text)

    def piece(self, kind: str, label: str, near: str, topic: str) -> str:
        if kind == "W":
            asked = self.rng.random() < 0.4
            return self.draw(ASK[label]) if asked else self.draw(PLEASE).replace("DO", self.draw(DO[label]))
        if kind == "C":
            return self.draw(CONTRAST).replace("NOT", self.draw(DO[near])).replace("DO", self.draw(DO[label]))
        return self.draw({"S": STORY[topic], "D": DENY.get(near, ""), "V": VAGUE}[kind])

    def ticket(self, label: str) -> str:
        """One text after a plan of story (S), wish (W), bare cry for help (V), denial (D) and contrast (C)."""
        near = self.rng.choice(NEAR[label].split())
        plan = self.rng.choices(list(PLANS), list(PLANS.values()))[0]
        if plan == "SV" and label not in SELF_EVIDENT:
            plan = "SW"
        topic = near if plan != "SV" and self.rng.random() < FOREIGN else label
        text = self.piece(plan[0], label, near, topic)
        for kind in plan[1:]:
            text += self.rng.choice(LINKS.get(plan, LINKS[""])) + self.piece(kind, label, near, topic)
        return self.manners(text)

    def manners(self, text: str) -> str:
        """The same text as a tidy, plain, terse, angry or foreign writer would send it."""
        rng = self.rng
        register = rng.choices(("tidy", "plain", "terse", "angry", "foreign"), (28, 34, 16, 8, 14))[0]
        if register != "terse" and rng.random() < 0.18:
            text = self.draw(OPEN) + rng.choice([", ", "! ", " "]) + text
        if register != "terse" and rng.random() < 0.16:
            text = text.rstrip(".,") + rng.choice([". ", ", ", " "]) + self.draw(CLOSE)
        text = re.sub(r"([?!])[.,]+", r"\1", re.sub(r" +(?=[ .,?!])", "", self.fill(text)))
        if register == "tidy":
            text = re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), re.sub(r"\bi\b", "I", text))
            text += "" if text[-1] in ".?!" else "."
        elif register == "terse":
            text = re.sub(*rng.choice([(r"[.,?!](?= |$)|'", ""), (r"\b(the|my|please) ", "")]), text)
        elif register == "angry":
            text = text.upper() if rng.random() < 0.15 else text.rstrip(".?!") + rng.choice(["!!", "!!!", "?!", "!"])
        elif register == "foreign":
            text = re.sub(r"\b(the|a|an) ", lambda m: "" if rng.random() < 0.6 else m[0], text)
        return self.typos(text) if rng.random() < 0.25 else text

    def typos(self, text: str) -> str:
        """One to three slips of a finger: a neighbouring key, a swap, a lost or doubled letter."""
        for _ in range(self.rng.randint(1, 3)):
            at = self.rng.randrange(1, len(text) - 1)
            here, after = text[at], text[at + 1]
            row = next((keys for keys in KEYS if here in keys), "")
            if row and after.isalpha():
                near = row[max(0, min(len(row) - 1, row.index(here) + self.rng.choice((-1, 1))))]
                slip = self.rng.choice([near + after, after + here, after, here + here + after])
                text = text[:at] + slip + text[at + 2 :]
        return text


def clean_rows(rng: random.Random) -> list[tuple[str, str]]:
    writer = Writer(rng)
    rows: list[tuple[str, str]] = []
    for label, size in SIZES.items():
        texts = {writer.fill(sentence): label for sentence in parts(WHOLE[label])}
        while len(texts) < size:
            text = writer.ticket(label)
            if 4 <= len(text.split()) <= 40:
                texts[text] = label
        rows += texts.items()
    return rng.sample(rows, len(rows))


def soil(rows: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """The dirt of a real export; see the top of this file."""

    def another(label: str) -> str:
        return rng.choice([other for other in SIZES if other != label])

    for at in rng.sample(range(len(rows)), WRONG_LABELS):
        rows[at] = rows[at][0], another(rows[at][1])
    for at in rng.sample(range(len(rows)), BROKEN_LINES):
        text = re.sub(r"([.,?!]) ", rng.choice(["\\1\n", "\\1\n\n"]), rows[at][0], count=2)
        rows[at] = text, rows[at][1]
    counts = (TWINS, CONFLICTS, EMPTY_TEXTS, EMPTY_LABELS)
    twins, conflicts, textless, unlabelled = (rng.sample(rows, count) for count in counts)
    rows += [(rng.choice([text, text, text.lower(), text.upper()]), label) for text, label in twins]
    rows += [(text, another(label)) for text, label in conflicts]
    rows += [("", label) for _, label in textless] + [(f"{text} - hello?", "") for text, _ in unlabelled]
    rng.shuffle(rows)
    for at in rng.sample([at for at, (_, label) in enumerate(rows) if label], PADDED_LABELS):
        rows[at] = rows[at][0], rng.choice([" {}", "{} ", "  {} "]).format(rows[at][1])
    return rows


def main() -> None:
    rng = random.Random(SEED)
    with Path(__file__).with_name("support_tickets.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ticket_id", "text", "category"])
        for ticket, (text, label) in enumerate(soil(clean_rows(rng), rng), 104_001):
            writer.writerow([ticket, text, label])


if __name__ == "__main__":
    main()
